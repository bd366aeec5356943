# The app in a container:
#
#   docker build -t gated-sae-studio .
#   docker run --rm -p 127.0.0.1:8501:8501 -v gsae-runs:/work/runs gated-sae-studio
#
# The app has no log-in and starts jobs for anyone who reaches its port: keep `127.0.0.1:` in front of
# the port, and come from afar through an SSH tunnel.
FROM python:3.12-slim

# torch for Linux comes from PyPI with CUDA, several GB. For a CPU alone:
#   docker build --build-arg TORCH_INDEX=ADDRESS_OF_PYTORCHS_CPU_WHEELS ...
ARG TORCH_INDEX=""

# numba and Triton compile below $HOME, the Hub's client and the corpora keep their caches there.
RUN useradd --create-home --uid 1000 studio && mkdir -p /work/runs && chown -R studio /work
WORKDIR /opt/gated-sae-studio
COPY requirements.txt .
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' requirements.txt)" \
    && grep -v '^-e' requirements.txt > pins.txt \
    && pip install --no-cache-dir -r pins.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

USER 1000
WORKDIR /work
VOLUME /work/runs
EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
# Every interface of the container; `docker run -p` says who reaches it.
ENV STREAMLIT_SERVER_ADDRESS=0.0.0.0
CMD ["gsae", "app", "--port", "8501"]
