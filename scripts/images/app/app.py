"""A Django application in one file: what the demo and the tests run out of a mount."""

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

settings.configure(SECRET_KEY="only for tests", ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])


def index(request):
    return HttpResponse(f"hello from Django {django.get_version()}\n", content_type="text/plain")


urlpatterns = [path("", index)]
application = get_wsgi_application()

if __name__ == "__main__":
    # One request through the whole stack, without a server.
    from wsgiref.util import setup_testing_defaults

    request = {}
    setup_testing_defaults(request)
    print(b"".join(application(request, lambda status, headers: None)).decode(), end="")
