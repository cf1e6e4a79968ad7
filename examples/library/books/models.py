"""What the library keeps."""

from django.db import models


class Book(models.Model):
    """A book, and how often it was lent."""

    title = models.CharField(max_length=200, unique=True)
    loans = models.PositiveIntegerField(default=0)

    def __str__(self) -> str:
        """Return the title."""
        return self.title
