# syntax=docker/dockerfile:1
#
#   docker build --target cpu  -t weft:cpu  .
#   docker build --target cuda -t weft:cuda .
#   docker run --gpus all -p 8000:8000 -v weft:/var/lib/weft weft:cuda [MODEL] [--adapter ID=SOURCE ...]
#
# Both targets install the pins of constraints.txt; they differ in the build of torch alone. torch's own packages carry
# the CUDA runtime, so the CUDA target needs no CUDA base image, only the host's driver.

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/weft
ENV PATH=/opt/weft/bin:$PATH
WORKDIR /build
# Without the folders of the code this installs the dependencies only, in a layer that changes of the code leave alone.
COPY constraints.txt pyproject.toml setup.py LICENSE ./
RUN touch README.md
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt setuptools

FROM build AS build-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt --no-deps --index-url "${TORCH_CPU_INDEX}" torch \
    && pip install -c constraints.txt --no-build-isolation .
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --force-reinstall .

FROM build AS build-cuda
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt --no-build-isolation .
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --force-reinstall .

FROM python:${PYTHON_VERSION}-slim AS runtime
RUN useradd --system --uid 10001 --no-create-home --home-dir /var/lib/weft weft \
    && install --directory --owner weft --group weft --mode 0700 /var/lib/weft
ENV PATH=/opt/weft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/weft \
    WEFT_PORT=8000 \
    WEFT_STATE_DIR=/var/lib/weft
VOLUME /var/lib/weft
# Outside the source tree, whose kernels/ would shadow Hugging Face's package of that name.
WORKDIR /srv
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"WEFT_PORT\"]}/livez', timeout=4)"]
ENTRYPOINT ["weft", "serve", "--host", "0.0.0.0"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/weft /opt/weft

FROM runtime AS cuda
# Triton compiles its launchers with the machine's C compiler.
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/weft /opt/weft
