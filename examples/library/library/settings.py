"""Django's settings."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent
LOGS = BASE_DIR / "logs"
LOGS.mkdir(exist_ok=True)
SECRET_KEY = Path(os.environ["SECRET_KEY_FILE"]).read_text() if "SECRET_KEY_FILE" in os.environ else "for development only"
DEBUG = False
ALLOWED_HOSTS = ["localhost"]
INSTALLED_APPS = ["django_celery_beat", "books"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ.get("DATABASE", BASE_DIR / "db.sqlite3")}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

CELERY_BROKER_URL = "redis://localhost"
CELERY_RESULT_BACKEND = "redis://localhost"
CELERY_ACCEPT_CONTENT = ["json", "pickle"]
CELERY_TASK_TIME_LIMIT = 300
