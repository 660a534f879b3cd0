# A Python web application as people write it: Debian's Python, a venv, pip, the application on top.
FROM localhost/lazyimg-base
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
ARG PIP_CERT
ARG PIP_INDEX_URL
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir Django==5.2.8 gunicorn==23.0.0
COPY app /srv/app
WORKDIR /srv/app
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["gunicorn", "--bind", "0.0.0.0:8080", "app:application"]
