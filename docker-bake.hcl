# docker buildx bake cpu | gpu | cpu-baked | gpu-baked | gateway; every variable below can be set in the environment.
# The token of a gated model: HF_TOKEN=... docker buildx bake gpu-baked, which makes a secret of it.

variable "REGISTRY" { default = "" } # "registry.example/team/", with the slash
variable "TAG" { default = "latest" }
variable "VERSION" { default = "0.1.0" }
variable "VLLM_VERSION" { default = "0.32.0" }
variable "COMMIT" { default = "" }
variable "SOURCE" { default = "" }
variable "PLATFORM" { default = "linux/amd64" } # an image may also be for linux/arm64
variable "RUN_AS" { default = "10001" }        # 0 where volumes belong to root, as RunPod's
variable "VLLM_EXTRA_ARGS" { default = "" }    # flags for the caches and for run time
variable "MODEL" { default = "HuggingFaceTB/SmolLM2-135M-Instruct" }
variable "REVISION" { default = "" }
variable "EXTRAS" { default = "" } # more of pyproject.toml: "ray" for deploy/kubernetes/overlays/rayservice
variable "WARM" { default = "auto" }   # caches: auto, on, off
variable "CACHE_FROM" { default = "" } # "type=registry,ref=registry.example/team/cache"
variable "CACHE_TO" { default = "" }   # the same, and ",mode=max"

group "default" {
  targets = ["gpu"]
}

group "baked" {
  targets = ["cpu-baked", "gpu-baked"]
}

group "all" {
  targets = ["cpu", "gpu", "cpu-baked", "gpu-baked", "gateway"]
}

target "_worker" {
  context    = "."
  dockerfile = "Dockerfile"
  target     = "worker"
  platforms  = [PLATFORM]
  cache-from = CACHE_FROM == "" ? [] : [CACHE_FROM]
  cache-to   = CACHE_TO == "" ? [] : [CACHE_TO]
  args = {
    VERSION         = VERSION
    COMMIT          = COMMIT
    SOURCE          = SOURCE
    RUN_AS          = RUN_AS
    VLLM_EXTRA_ARGS = VLLM_EXTRA_ARGS
    EXTRAS          = EXTRAS
  }
}

target "_baked" {
  inherits = ["_worker"]
  target   = "baked"
  secret   = ["id=HF_TOKEN,env=HF_TOKEN"]
  args = {
    MODEL    = MODEL
    REVISION = REVISION
    WARM     = WARM
  }
}

target "_gpu" {
  args = {
    ENGINE       = "gpu"
    VLLM_VERSION = VLLM_VERSION
  }
}

target "cpu" {
  inherits = ["_worker"]
  tags     = ["${REGISTRY}firsttoken:${TAG}-cpu"]
  args     = { ENGINE = "cpu" }
}

target "gpu" {
  inherits = ["_worker", "_gpu"]
  tags     = ["${REGISTRY}firsttoken:${TAG}"]
}

target "cpu-baked" {
  inherits = ["_baked"]
  tags     = ["${REGISTRY}firsttoken:${TAG}-cpu-baked"]
  args     = { ENGINE = "cpu" }
}

target "gpu-baked" {
  inherits = ["_baked", "_gpu"]
  tags     = ["${REGISTRY}firsttoken:${TAG}-baked"]
}

target "gateway" {
  context    = "."
  dockerfile = "deploy/gateway/Dockerfile"
  target     = "gateway"
  platforms  = [PLATFORM]
  cache-from = CACHE_FROM == "" ? [] : [CACHE_FROM]
  cache-to   = CACHE_TO == "" ? [] : [CACHE_TO]
  tags       = ["${REGISTRY}firsttoken-gateway:${TAG}"]
  args = {
    VERSION = VERSION
    COMMIT  = COMMIT
    SOURCE  = SOURCE
    RUN_AS  = RUN_AS
  }
}
