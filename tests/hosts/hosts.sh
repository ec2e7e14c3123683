# Three hosts on one machine, for the scripts beside this file: network namespaces a, b and c on a bridge. Host c is behind
# a link of 2.5 Gbit/s and 0.2 ms each way, and sees neither the output nor the others' copy of the model.
#
# Sets WORK (scratch), and gives `skip` and `on_hosts`. Ends with 77 where namespaces can't be made.
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
export WORK NET=dq$$
WORK=$(mktemp -d)

cleanup() {
    for host in a b c; do
        ip netns pids "$NET-$host" 2> /dev/null | xargs -r kill -9 2> /dev/null || true
        ip netns del "$NET-$host" 2> /dev/null || true
        rm -rf "/etc/netns/$NET-$host"
    done
    ip link del "$NET" 2> /dev/null || true
    rm -rf "$WORK"
}
trap cleanup EXIT

skip() {
    echo "SKIPPED: no pretend hosts here: $1" >&2
    exit 77
}
[[ $(id -u) == 0 ]] || skip "not root"
hash ip unshare python3 2> /dev/null || skip "iproute2, util-linux and python3 are needed"

cable() { # cable HOST
    ip link add "$NET$1" type veth peer name eth0 netns "$NET-$1" 2> /dev/null || skip "the kernel gives no veth"
}
shape() { # shape QDISC... : both ends of host c's cable
    { tc qdisc add dev "${NET}c" root "$@" && tc -n "$NET-c" qdisc add dev eth0 root "$@"; } 2> /dev/null
}
link_to_c() { # sets delayed, for measure
    delayed=delayed
    cable c
    shape netem rate 2500mbit delay 0.2ms && return
    ip link del "${NET}c"
    [[ -c /dev/net/tun ]] && read -r < <(exec "$here/link" "${NET}c" "$NET-c") && return
    delayed=
    cable c
    if shape tbf rate 2500mbit burst 4mb latency 50ms; then
        echo "neither netem nor TAP devices here: 2.5 Gbit/s without a delay" >&2
    else
        echo "the kernel shapes no traffic: all links are as fast as memory" >&2
    fi
}

# Hydra, which is MPICH's mpirun, writes hosts in another way.
slots=" slots=1"
if mpirun --version 2>&1 | grep -q HYDRA; then slots=:1; fi

ip link add "$NET" type bridge 2> /dev/null || skip "the kernel gives no bridge"
ip link set "$NET" up
number=0
for host in a b c; do
    number=$((number + 1))
    ip netns add "$NET-$host" 2> /dev/null || skip "the kernel gives no network namespaces"
    if [[ $host == c ]]; then link_to_c; else cable "$host"; fi
    ip link set "$NET$host" master "$NET" up
    ip -n "$NET-$host" addr add "10.77.0.$number/24" dev eth0
    ip -n "$NET-$host" link set eth0 up
    ip -n "$NET-$host" link set lo up
    mkdir -p "/etc/netns/$NET-$host"
    printf '127.0.0.1 localhost\n10.77.0.1 a\n10.77.0.2 b\n10.77.0.3 c\n' > "/etc/netns/$NET-$host/hosts"
    echo "$host$slots" >> "$WORK/hosts"
done
"$here/measure" "$NET" $delayed

# The same for Open MPI 4 and 5 and for Hydra, which read other names.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
export OMPI_MCA_plm_rsh_agent=$here/agent PRTE_MCA_plm_ssh_agent=$here/agent
export HYDRA_LAUNCHER=rsh HYDRA_LAUNCHER_EXEC=$here/agent HYDRA_IFACE=eth0
# UCX would see that it is one machine, and share memory.
export UCX_TLS=tcp,self UCX_NET_DEVICES=eth0
export OMPI_MCA_oob_tcp_if_include=10.77.0.0/24 PRTE_MCA_prte_if_include=10.77.0.0/24
export OMPI_MCA_btl=tcp,self OMPI_MCA_btl_tcp_if_include=10.77.0.0/24

on_hosts() { # on_hosts COMMAND... : one rank on each, started on host a
    "$here/agent" a "mpirun --hostfile $WORK/hosts -np 3 --bind-to none $*"
}

# The model and the data as hosts a and b see them, and host c's own copy.
give_hosts() { # give_hosts MODEL CALIB
    mkdir -p "$WORK/shared/out"
    cp -r "$1" "$WORK/shared/model"
    cp -r "$1" "$WORK/elsewhere"
    cp "$2" "$WORK/shared/calib.jsonl"
}
