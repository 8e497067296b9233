#!/usr/bin/env bash
# What the C++ library and its tests are built with, on Debian 12 or 13 and Ubuntu; run as root. A second run does nothing.
#
#     runtime/cpp/install_dependencies.sh [PREFIX]
#
# Packages of the distribution, and ONNX Runtime's headers: Debian has them from 13 (trixie) on, in libonnxruntime-dev,
# which is unpacked into PREFIX/include (default /usr/local). The libraries come from the Python wheels onnxruntime and
# openvino, or from wherever you have them.
set -euo pipefail

readonly prefix=${1:-/usr/local}
readonly headers=$prefix/include/onnxruntime
# Package:least version.
readonly packages=(cmake:3.22 g++:4:10 ninja-build:1.10 nlohmann-json3-dev:3.10 libssl-dev:3.0 doctest-dev:2.4 libstb-dev:0)
readonly optional=(clang)  # the tests build with it too, where it is there
readonly debian=http://deb.debian.org/debian suite=trixie

refuse() {
    echo "error: $1" >&2
    exit 1
}

missing_packages() {
    local entry name least found
    for entry in "${packages[@]}"; do
        name=${entry%%:*} least=${entry#*:}
        found=$(dpkg-query -W -f '${db:Status-Abbrev}${Version}' "$name" 2>/dev/null | sed -n 's/^ii *//p') || true
        [[ -n $found ]] && dpkg --compare-versions "$found" ge "$least" || echo "$name"
    done
    for name in "${optional[@]}"; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$name" 2>/dev/null | grep -q ^ii || echo "$name"
    done
}

install_packages() {
    local missing
    missing=$(missing_packages)
    [[ -z $missing ]] && return
    [[ $(id -u) == 0 ]] || refuse "these packages are missing, and only root installs them: ${missing//$'\n'/ }"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null \
        || refuse "apt-get could not install ${missing//$'\n'/ }"
}

# apt-get with a source list and state of its own: nothing of trixie's is ever installed here.
unpack_headers() {
    [[ -f $headers/onnxruntime_c_api.h || -f /usr/include/onnxruntime/onnxruntime_c_api.h ]] && return
    local work
    work=$(mktemp -d)
    trap "rm -rf '$work'" EXIT
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [[ -f $keyring ]] || refuse "$keyring is missing: install debian-archive-keyring, or unpack the headers of ONNX Runtime into $headers yourself"
    mkdir -p "$work"/{lists,cache}/partial "$work"/cache/archives/partial
    echo "deb [signed-by=$keyring] $debian $suite main" >"$work/sources.list"
    local options=(-qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update || refuse "$debian cannot be reached, for ONNX Runtime's headers"
    (cd "$work" && apt-get "${options[@]}" download libonnxruntime-dev) || refuse "libonnxruntime-dev could not be downloaded from $debian"
    dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/unpacked"
    mkdir -p "$prefix/include"
    cp -r "$work/unpacked/usr/include/onnxruntime" "$prefix/include/"
}

command -v apt-get >/dev/null || refuse "apt-get is missing: install the equivalents of ${packages[*]%%:*} by hand"
install_packages
unpack_headers
