#!/bin/sh
# Builds the native module's streams with the sanitizers and lets tests/native/stream_test.cc loose on them.
#
#     tools/sanitize.sh [CALLS [SEED]]         e.g. tools/sanitize.sh 1000000
#
# SANITIZERS chooses some of "none address,undefined thread"; CXX the compiler.
set -eu
cd "$(dirname "$0")/.."
native=server/forno/server/transport/envoy/native
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for sanitizer in ${SANITIZERS:-none address,undefined thread}; do
  flags="-O1 -g -std=c++17 -Wall -Wextra -pthread -fno-omit-frame-pointer -I$native"
  [ "$sanitizer" = none ] || flags="$flags -fsanitize=$sanitizer -fno-sanitize-recover=all"
  # shellcheck disable=SC2046,SC2086
  ${CXX:-c++} $flags $(grep -LE 'Python.h|interpreter.h' "$native"/*.cc) tests/native/stream_test.cc -o "$folder/test"
  printf '%-18s ' "$sanitizer:"
  "$folder/test" "${1:-20000}" "${2:-1}"
done
