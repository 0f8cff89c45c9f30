# The demo on a GPU host:  docker build -t spectr-demo .
#   docker run --gpus all -p 7860:7860 -v spectr-cache:/cache spectr-demo
# PyTorch's wheels bring CUDA with them; the host needs NVIDIA's driver and container toolkit. Without
# `--gpus` the same image runs on the CPU. For several replicas (docs/operations.md), install requirements-ray.txt
# as well, copy deploy/, and run `python deploy/ray_serve.py --host 0.0.0.0`; Ray wants `--shm-size 1g`.
FROM python:3.12.12-slim-bookworm

# Gradio binds to this machine alone unless told otherwise; weights and alignments go to the volume.
ENV PYTHONUNBUFFERED=1 \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860 \
    HF_HOME=/cache/huggingface \
    SPECTR_CACHE=/cache/spectr-demo

# bitsandbytes needs the OpenMP runtime on a CPU. Debian's stable release names its version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 spectr && install --directory --owner spectr /cache
WORKDIR /app

# The libraries first: they change less often than the code.
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY --chown=spectr app.py README.md ./
COPY --chown=spectr assets assets
COPY --chown=spectr spectr_demo spectr_demo

USER 1000
VOLUME /cache
EXPOSE 7860
# The first start fetches and quantizes the base.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7860/', timeout=4)"]
CMD ["python", "app.py"]
