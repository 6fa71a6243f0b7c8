#!/usr/bin/env bash
# Sets up, then builds the documentation as a site, with warnings as errors: site/index.html, or in the folder $1.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup docs
cd "$HDET_ROOT"
site="${1:-site}"
python -m sphinx --quiet --fail-on-warning --builder html docs "$site"
echo "$site/index.html"
