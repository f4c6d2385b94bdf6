#!/bin/sh
# Install the browser of the tests of the demo where there is none: the package chromium of Debian and its relatives.
set -eu
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
as_root=$([ "$(id -u)" = 0 ] || echo sudo)
command -v apt-get >/dev/null || { echo "install Chromium, so that 'chromium' is on the path" >&2; exit 1; }
$as_root apt-get update -q
$as_root apt-get install -y -q --no-install-recommends chromium
