#!/bin/sh
# Packs image sets and weights into pieces for a machine that takes 64 MiB at a time, together with the tree, and joins them.
#
#   bench/pack_gpu.sh pack PIECES PATH ...   folders and files into PIECES/piece.00, .01, ..., and their sums in PIECES/sums
#   bench/pack_gpu.sh join PIECES DIR        checks the pieces and unpacks them into DIR, each PATH under its last name
#
# $PIECE is the size of a piece, 48m if not set. After
#   bench/pack_gpu.sh pack PIECES DATA/MNIST DATA/cifar-10-batches-py DATA/clothing-160 lite0.pth lite2.pth
#   bench/pack_gpu.sh join PIECES DIR
# LEARNDROP_DATA and LEARNDROP_WEIGHTS are both DIR.
set -eu
fail() {
  echo "pack_gpu.sh: $1" >&2
  exit 2
}
case ${1:-} in
  pack) [ $# -ge 3 ] || fail "pack wants PIECES and a PATH, got $(($# - 1)) arguments" ;;
  join) [ $# -eq 3 ] || fail "join wants PIECES and DIR, got $(($# - 1)) arguments" ;;
  *) fail "action must be pack or join, got '${1:-}'" ;;
esac
action=$1 pieces=$2
shift 2
if [ "$action" = pack ]; then
  for path; do [ -e "$path" ] || fail "PATH must be a folder or file, got $path"; done
  [ ! -e "$pieces" ] || fail "PIECES must be a new folder, got $pieces"
  mkdir -p "$pieces"
  for path; do
    tar -rf "$pieces/all.tar" -C "$(dirname "$path")" "$(basename "$path")"
  done
  (cd "$pieces" && gzip -1 all.tar && split -b "${PIECE:-48m}" -d all.tar.gz piece. && rm all.tar.gz && sha256sum piece.* > sums)
  ls -l "$pieces"
else
  [ -f "$pieces/sums" ] || fail "PIECES must hold sums, got none in $pieces"
  (cd "$pieces" && sha256sum --quiet -c sums) || fail "pieces must be as they were packed, in $pieces"
  mkdir -p "$1"
  cat "$pieces"/piece.* | tar -xzf - -C "$1"
fi
