"""Production behaviour for any Celery application, without changing its code."""
