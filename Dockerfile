# The worker as an image: docs/builder.md says how to build and run it, docs/decisions/0009-image.md why
# it is built so. Without arguments it is the worker for GPUs, without a model. docker-bake.hcl has the rest:
#
#     docker buildx bake cpu | gpu | cpu-baked | gpu-baked
#
# From the bottom: engine, model, caches and manifest, our code. Each changes more often than the one before.

ARG ENGINE=gpu
ARG VLLM_VERSION=0.32.0


FROM python:3.11-slim-bookworm AS slim


# What is to be installed, and nothing else of pyproject.toml: its other lines install nothing again.
FROM slim AS requirements
ARG ENGINE
ARG EXTRAS
COPY pyproject.toml scripts/requirements.py /
# hadolint ignore=SC2086
RUN python /requirements.py "${ENGINE}" aws runpod s3 ${EXTRAS} < /pyproject.toml > /requirements.txt \
 && python /requirements.py fetch < /pyproject.toml > /fetch.txt


# docs/decisions/0002-install.md: torch has a step of its own, and PyTorch's index is asked for torch alone.
# 0001-torchvision.md: what PyPI has of the last three fits CUDA's torch only.
FROM slim AS cpu-engine
ARG TORCH=torch==2.13.0+cpu
ARG RUNPOD=runpod==1.12.0
ENV PATH=/opt/venv/bin:${PATH}
RUN apt-get update \
 && apt-get install -y --no-install-recommends libnuma1 \
 && rm -rf /var/lib/apt/lists/*
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
 && { pip install --no-deps "${TORCH}" \
   || pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "${TORCH}"; }
COPY --from=requirements /requirements.txt /opt/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip install -r /opt/requirements.txt \
 && pip install --no-deps "${RUNPOD}" \
 && pip uninstall -y torchvision torchaudio torchcodec


# vLLM is in the system's Python; what it lacks goes beside it, and nothing of it is replaced. uv, which has
# installed it, compiles nothing, and not every file is for this Python: templates, tests.
# The folder that is added is where Lambda has the driver (aws/deep-learning-containers, docker/lambda/Dockerfile).
FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu-engine
ARG RUNPOD=runpod==1.12.0
ENV PATH=/opt/venv/bin:${PATH} \
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH}:/x86_64-bottlerocket-linux-gnu/sys-root/usr/lib/nvidia
COPY --from=requirements /requirements.txt /opt/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
 && python3 -m venv --system-site-packages --without-pip /opt/venv \
 && python -m pip install -r /opt/requirements.txt \
 && python -m pip install --no-deps "${RUNPOD}" \
 && { python -m compileall -q -j 0 "${packages}" || true; }


# Our code, compiled by the Python that runs it.
FROM ${ENGINE}-engine AS code
COPY handler /out/app/handler
COPY builder /out/app/builder
RUN chmod -R u=rwX,go=rX /out \
 && python -m compileall -q /out


# A model. It depends on no engine and on those files only that a fetch imports, so that it is seldom fetched
# again; if it is, from a cache that the builder keeps. Its files have the modes and the one time that a fetch
# gives them, and the folder above them too: the same model is the same layer.
FROM slim AS fetch
COPY --from=requirements /fetch.txt /opt/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip install -r /opt/fetch.txt
WORKDIR /app
COPY handler/__init__.py handler/errors.py handler/fetched.py handler/levers.py handler/manifest.py handler/members.py handler/messages.py \
     handler/prerequisites.py handler/settings.py handler/stored.py handler/table.py handler/unread.py handler/
COPY builder builder
ARG MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
ARG REVISION
ARG HF_ENDPOINT
ARG AWS_REGION
ARG AWS_ENDPOINT_URL
RUN --mount=type=secret,id=HF_TOKEN \
    --mount=type=secret,id=aws,target=/root/.aws/credentials \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/var/cache/firsttoken,sharing=locked \
    folder=$(XDG_CACHE_HOME=/var/cache python -m builder fetch "${MODEL}" ${REVISION:+--revision "${REVISION}"}) \
 && mkdir -p /out/bake \
 && cp -a "${folder}" /out/bake/model \
 && touch --date=@315532800 /out/bake


# What every worker has. HOME is a folder that exists and can be written to when all else is read-only and the
# user is somebody else's choice; USER is for getpass, which knows no other name for a uid without an entry.
FROM ${ENGINE}-engine AS runtime
ARG RUN_AS=10001
ARG VLLM_EXTRA_ARGS
ENV HOME=/tmp \
    USER=worker \
    PYTHONPATH=/app \
    HOST=0.0.0.0 \
    VLLM_EXTRA_ARGS=${VLLM_EXTRA_ARGS}
WORKDIR /app
USER ${RUN_AS}:${RUN_AS}
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m CMD ["python", "-m", "handler.healthcheck"]
ENTRYPOINT ["python", "-m", "handler"]
ARG VERSION=0.1.0
ARG COMMIT
ARG SOURCE
LABEL org.opencontainers.image.title="firsttoken" \
      org.opencontainers.image.description="A serverless worker for language models: vLLM in process, behind the OpenAI URL" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.source="${SOURCE}"


# The caches of a first start, and the manifest. A machine without a GPU can't make those of one:
# WARM=auto leaves them out there, WARM=off everywhere.
FROM runtime AS warm
USER 0:0
COPY --link --from=fetch /out/ /
COPY --link --from=code /out/ /
ARG ENGINE
ARG WARM=auto
RUN case "${WARM}-${ENGINE}" in \
      off-*) ;; \
      auto-gpu) [ ! -e /dev/nvidiactl ] || python -m builder warm /bake ;; \
      auto-cpu | on-*) python -m builder warm /bake ;; \
      *) echo "WARM=${WARM}: auto, on or off is meant" >&2; exit 64 ;; \
    esac \
 && python -m builder seal /bake \
 && mkdir -p /out/bake \
 && mv /bake/manifest.json /out/bake/ \
 && if [ -e /bake/cache ]; then mv /bake/cache /out/bake/; fi \
 && touch --date=@315532800 /out/bake/manifest.json /out/bake


# The worker with a model in it.
FROM runtime AS baked
COPY --link --from=fetch /out/ /
COPY --link --from=warm /out/ /
COPY --link --from=code /out/ /
ENV MODEL_NAME=/bake


# The worker without one: MODEL_NAME says at run time which.
FROM runtime AS worker
COPY --link --from=code /out/ /
