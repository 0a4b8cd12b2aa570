#!/usr/bin/env bash
# Packs what a GPU machine without a package index lacks into .site/site.tgz (about 7 MB): the other optimizers, TRL and
# datasets, as wheels' contents for one Python on x86-64 Linux. There, unpack it and name it in PYTHONPATH:
#
#     bash benchmarks/pack_site.sh [PYTHON VERSION, default 3.12]
#     tar xzf .site/site.tgz -C /tmp && export PYTHONPATH=/tmp/site
set -euo pipefail

version="${1:-3.12}"
packages=(bitsandbytes==0.50.2 torchao==0.18.0 trl==1.16.0 datasets==5.2.0 gefen-x==0.5.0 multiprocess==0.70.19
    dill==0.4.1 httpx==0.28.1 flashoptim==0.1.4)
# bitsandbytes has a library for each CUDA; torchao's large one is of kernels for its quantized layers.
kept='libbitsandbytes_(cpu|cuda130)\.so'

folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.site"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
platforms=()
for glibc in 39 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp --abi "cp${version/./}" --abi abi3 --abi none "${platforms[@]}" --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 --dest "$work/wheels" "${packages[@]}"

mkdir -p "$work/site" "$folder"
for wheel in "$work"/wheels/*.whl; do "${PYTHON:-python3}" -m zipfile -e "$wheel" "$work/site"; done
find "$work/site/bitsandbytes" -name 'lib*.so' | grep -Ev "$kept" | xargs -r rm
find "$work/site/torchao" -name '*cutlass*.so' -delete
tar -C "$work" -czf "$folder/site.tgz" site
du -h "$folder/site.tgz"
