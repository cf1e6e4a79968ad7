"""The library's tasks."""

from celery import shared_task
from django.conf import settings
from django.db.models import F

from books.models import Book


@shared_task
def lend(title: str) -> int:
    """Lend a book, and return how often it has been lent."""
    book, _ = Book.objects.get_or_create(title=title)
    Book.objects.filter(pk=book.pk).update(loans=F("loans") + 1)
    book.refresh_from_db()
    with (settings.LOGS / "loans.log").open("a") as log:
        log.write(f"{title}\n")
    return book.loans
