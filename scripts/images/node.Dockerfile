# A Node application: thousands of small files, from Debian's npm and from the npm registry.
FROM localhost/lazyimg-base
RUN apt-get update && apt-get install -y --no-install-recommends nodejs npm \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
ARG NODE_EXTRA_CA_CERTS
ARG NPM_CONFIG_REGISTRY
WORKDIR /srv/app
RUN npm install --no-audit --no-fund express@4.21.2 lodash@4.17.21 date-fns@3.6.0 rxjs@7.8.1 typescript@5.7.3 \
 && rm -rf /root/.npm
RUN printf '%s\n' "const express = require('express');" "const app = express();" \
 "app.get('/', (request, response) => response.send('hello from express\\n'));" \
 "app.listen(process.env.PORT || 8080, '127.0.0.1');" > server.js
CMD ["node", "server.js"]
