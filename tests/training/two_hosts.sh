#!/usr/bin/env bash
# two_hosts.sh up|down: two network namespaces, cwcl0 and cwcl1, on a bridge; 10.77.9.10 and .11.
# two_hosts.sh run 0|1 COMMAND...: runs it there, on a host named cwcl0 or cwcl1. The name must not
# resolve to a loopback address: that is the address which gloo offers to its peers.
set -euo pipefail

down() {
  for i in 0 1; do
    ip link del "cwclv$i" 2>/dev/null || true
    ip netns del "cwcl$i" 2>/dev/null || true
  done
  ip link del cwclbr 2>/dev/null || true
}

up() {
  ip link add cwclbr type bridge
  ip addr add 10.77.9.1/24 dev cwclbr
  ip link set cwclbr up
  for i in 0 1; do
    ip netns add "cwcl$i"
    ip link add "cwclv$i" type veth peer name eth0 netns "cwcl$i"
    ip link set "cwclv$i" master cwclbr up
    ip -n "cwcl$i" addr add "10.77.9.1$i/24" dev eth0
    ip -n "cwcl$i" link set eth0 up
    ip -n "cwcl$i" link set lo up
    ip -n "cwcl$i" route add default via 10.77.9.1
  done
}

run() {
  local i=$1 hosts
  shift
  hosts=$(mktemp)
  printf '127.0.0.1 localhost\n10.77.9.10 cwcl0\n10.77.9.11 cwcl1\n' >"$hosts"
  # shellcheck disable=SC2016  # for the inner shell
  exec nsenter --net="/run/netns/cwcl$i" unshare --mount --uts -- bash -c \
    'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"' run "$hosts" "cwcl$i" "$@"
}

case "${1:-}" in
  up) down && up ;;
  down) down ;;
  run) shift && run "$@" ;;
  *) echo "usage: $0 up|down|run" >&2 && exit 2 ;;
esac
