# Hundreds of MB of large shared libraries.
FROM localhost/lazyimg-base
RUN apt-get update && apt-get install -y --no-install-recommends \
 libllvm14 libllvm15 libclang-cpp14 libclang1-14 libicu72 libopenblas0-pthread libz3-4 \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
CMD ["bash"]
