#!/bin/bash
# Installs what building and testing distq needs, or says what to install. Does nothing where all is there.
set -euo pipefail

rust_minimum=1.89

missing=()
need() { # need PACKAGE CONDITION...
    local package=$1
    shift
    "$@" > /dev/null 2>&1 || missing+=("$package")
}
has_libclang() {
    [[ -n "${LIBCLANG_PATH:-}" ]] && return
    # libclang-cpp, which comes along with other packages, is another library.
    ldconfig -p | grep -q 'libclang\(-[0-9.]*\)\?\.so' || compgen -G '/usr/lib/llvm-*/lib/libclang[.-][s0-9]*'
}

need build-essential command -v cc
need make command -v make
need openmpi-bin command -v mpirun
need libopenmpi-dev command -v "${MPICC:-mpicc}"
need libclang-dev has_libclang
need python3 command -v python3
need python3-venv python3 -c 'import ensurepip, venv'
need git command -v git

if ((${#missing[@]})); then
    if ! command -v apt-get > /dev/null; then
        echo "distq needs these (Debian's names): ${missing[*]}; install them and try again" >&2
        exit 1
    elif [[ $(id -u) == 0 ]]; then
        sudo=()
    elif sudo -n true 2> /dev/null; then
        sudo=(sudo)
    else
        echo "distq needs packages; run: sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
    echo "installing ${missing[*]}"
    "${sudo[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq "${missing[@]}" > /dev/null
fi

version=$(cargo --version 2> /dev/null | cut -d' ' -f2 || true)
if [[ -z $version ]] || [[ $(printf '%s\n' "$rust_minimum" "$version" | sort -V | head -1) != "$rust_minimum" ]]; then
    echo "distq needs Rust $rust_minimum or newer (found: ${version:-none}); install it with rustup, https://rustup.rs:" >&2
    echo "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y && . ~/.cargo/env" >&2
    exit 1
fi
