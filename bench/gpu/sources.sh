#!/usr/bin/env bash
# One checksum of all that the extension is compiled from.
cd "$(dirname "$0")/../.." && LC_ALL=C sha256sum setup.py csrc/* | sha256sum | cut -d " " -f 1
