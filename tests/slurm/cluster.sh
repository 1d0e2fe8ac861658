#!/usr/bin/env bash
# A real Slurm cluster on one Debian machine, for tests: slurmctld, slurmdbd and munge, and N nodes that are namespaces.
#
#   cluster.sh up [N=4]        install what is missing, start everything, return when N nodes are idle
#   cluster.sh down            end every process started here and remove every trace but the packages
#   cluster.sh status          daemons, nodes and jobs; 1 when it is not up
#   cluster.sh env             what a shell needs: eval "$(tests/slurm/cluster.sh env)"; sinfo
#   cluster.sh crash NODE      sudden death: the link first, then every process there by SIGKILL
#   cluster.sh boot NODE       a crashed node back, with a fresh network stack
#   cluster.sh cut NODE        the link only; processes go on
#   cluster.sh join NODE       the link back
#   cluster.sh on NODE CMD...  as if logged in there
#   cluster.sh check           whether this machine can have one: 0, or 3 and the reason
#   cluster.sh heal            links back, crashed and lost nodes rebooted; returns when all are idle
#
# Exit status: 0 done, 1 failed, 2 not understood, 3 this machine cannot have one (a sentence on stderr says why).
#
# A node has network, PID, mount and host-name namespaces of its own; files, users, memory and cores are the machine's.
# Nodes reach each other and `head`, which is the machine itself, by name, and nothing else. No file of the machine is
# changed: names are bind-mounted into the nodes, addresses stand in slurm.conf, and SLURM_CONF says where that is.
# The switches below may be set in the environment; give SLURM_CLUSTER_DIR and SLURM_CLUSTER_NET, of which a second one
# on this machine needs its own, to every command alike.
set -euo pipefail

STATE=${SLURM_CLUSTER_DIR:-/var/tmp/ddp-asr-slurm}  # configuration, logs (log/), databases, pids
NET=${SLURM_CLUSTER_NET:-10.83.0}                   # first three numbers of a /24 that is used for nothing else
CPUS=${SLURM_CLUSTER_CPUS:-32}                      # per node, as Slurm is told; these three are only counted
MEMORY_MB=${SLURM_CLUSTER_MEM:-256000}
GPUS=${SLURM_CLUSTER_GPUS:-8}                       # copies of /dev/null
GRACE_S=${SLURM_CLUSTER_GRACE:-10}                  # from the pre-emption's warning to its kill, in partition `low`
REQUEUE_WAIT_S=${SLURM_CLUSTER_REQUEUE_WAIT:-10}    # how long a requeued job is held back, at least 5 (usual: 120)
NODE_TIMEOUT_S=${SLURM_CLUSTER_NODE_TIMEOUT:-10}    # silence after which a node counts as down (usual: 300)
EXTRA=${SLURM_CLUSTER_EXTRA:-}                      # more lines of slurm.conf

CONF=$STATE/etc/slurm.conf
IFS=. read -r _ second third <<<"$NET"
BRIDGE=asr$second-$third
PORT=$((20000 + 3 * ((256 * second + third) % 4000)))  # slurmctld's; slurmd and slurmdbd take the next two
PACKAGES=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server iproute2)
COMMANDS=(slurmctld slurmd sbatch slurmdbd munged mariadbd mariadb-install-db ip unshare nsenter setsid)

say() { printf '%s\n' "$*"; }
die() { printf 'cluster.sh: %s\n' "$*" >&2; exit 1; }

# ---- can it be at all ------------------------------------------------------------------------------------------------

cannot() {
    printf 'no Slurm cluster here: %s\n' "$*" >&2
    trap - EXIT
    [[ -z ${begun:-} ]] || rm -rf "$STATE"
    exit 3
}

missing_commands() {
    local name
    for name in "${COMMANDS[@]}"; do command -v "$name" >/dev/null || echo "$name"; done
}

check_machine() {
    ((EUID == 0)) || cannot "it takes root, to make namespaces and a bridge"
    if [[ -n $(missing_commands) ]] && ! { [[ -e /etc/debian_version ]] && command -v apt-get >/dev/null; }; then
        cannot "$(missing_commands | xargs) missing, and this is no Debian to install ${PACKAGES[*]} on"
    fi
    unshare --net --pid --mount --uts --fork --mount-proc true 2>/dev/null ||
        cannot "the kernel grants no network, PID, mount and host-name namespaces"
}

make_bridge() {  # after the packages, one of which brings `ip`
    ! ip -4 route show | grep -q "^$NET\." || die "$NET.0/24 is in use here: set SLURM_CLUSTER_NET"
    ! ip link show "$BRIDGE" >/dev/null 2>&1 || die "there is a network device $BRIDGE: remove it with 'ip link del'"
    ip link add "$BRIDGE" type bridge 2>/dev/null || cannot "the kernel makes no network bridge $BRIDGE"
    ip addr add "$NET.254/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
}

install_packages() {
    [[ -n $(missing_commands) ]] || return 0
    say "installing ${PACKAGES[*]} ..."
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}"; } \
        >"$STATE/log/apt.out" 2>&1 || cannot "apt-get does not install Slurm here: $(tail -1 "$STATE/log/apt.out")"
}

# ---- processes, by pid and start time: a pid alone may be somebody else's by now -------------------------------------

start_time() {  # nothing where the process is gone or waits to be reaped
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    read -ra stat <<<"${stat##*) }"
    [[ ${stat[0]} == Z ]] || echo "${stat[19]}"
}

pid_of() {
    local pid since
    read -r pid since 2>/dev/null <"$STATE/run/$1.pid" || return 1
    [[ -n $since && $(start_time "$pid") == "$since" ]] && echo "$pid"
}

# A clean environment, for what daemons see their jobs see; a session of its own, out of reach of the terminal's Ctrl-C;
# and none of the caller's open files, a lock of which it would hold for as long as it lives.
spawn() {
    local name=$1
    shift
    {
        for fd in "/proc/$BASHPID/fd"/*; do ((${fd##*/} < 3)) || eval "exec ${fd##*/}>&-"; done
        exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
            SLURM_CONF="$CONF" MYSQL_UNIX_PORT="$STATE/db/mysqld.sock" setsid "$@"
    } </dev/null >>"$STATE/log/$name.out" 2>&1 &
    echo "$! $(start_time $!)" >"$STATE/run/$name.pid"
}

stop() {  # stop NAME SIGNAL...: the next signal where the last has not been enough within 10 s
    local name=$1 pid signal i
    shift
    for signal in "$@"; do
        pid=$(pid_of "$name") || break
        kill "-$signal" "$pid" 2>/dev/null || true
        for ((i = 0; i < 100; i++)); do
            pid_of "$name" >/dev/null || break
            sleep 0.1
        done
    done
    rm -f "$STATE/run/$name.pid"
}

wait_for() {  # wait_for SECONDS WHAT CMD...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || die "$what did not come up; the logs are in $STATE/log"
        sleep 0.1
    done
}

# ---- configuration ---------------------------------------------------------------------------------------------------

nodes() { seq -f 'node%.0f' "$(cat "$STATE/n")"; }

is_up() { [[ -f $STATE/n ]] && pid_of slurmctld >/dev/null; }

write_names() {
    local i
    {
        echo "127.0.0.1 localhost"
        echo "$NET.254 head"
        # Never a loopback address: gloo publishes what its host name resolves to.
        for ((i = 1; i <= $1; i++)); do echo "$NET.$i node$i"; done
    } >"$STATE/etc/hosts"
    : >"$STATE/etc/resolv.conf"  # any other name fails at once
}

write_accounting_conf() {
    cat >"$STATE/etc/slurmdbd.conf" <<EOF
AuthType=auth/munge
AuthInfo=socket=$STATE/run/munge.sock
DbdHost=localhost
DbdPort=$((PORT + 2))
SlurmUser=root
PidFile=$STATE/run/slurmdbd.own.pid
LogFile=$STATE/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
EOF
    chmod 600 "$STATE/etc/slurmdbd.conf"  # slurmdbd refuses anything wider
}

write_slurm_conf() {
    local n=$1 i
    for ((i = 0; i < GPUS; i++)); do mknod -m 666 "$STATE/dev/nvidia$i" c 1 3; done  # slurmd insists on device files
    echo "NodeName=node[1-$n] Name=gpu File=$STATE/dev/nvidia[0-$((GPUS - 1))]" >"$STATE/etc/gres.conf"
    # slurmd looks for cgroups even if nothing uses them; of its plugins v1 starts in a node's bare /sys.
    echo "CgroupPlugin=cgroup/v1" >"$STATE/etc/cgroup.conf"
    cat >"$CONF" <<EOF
ClusterName=ddpasr
SlurmctldHost=head($NET.254)
SlurmUser=root
# cred_expire is also how long a requeued job waits before it may start again.
AuthType=auth/munge
AuthInfo=socket=$STATE/run/munge.sock,cred_expire=$REQUEUE_WAIT_S
# On the bridge alone, not on the machine's own addresses.
CommunicationParameters=NoCtldInAddrAny
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
SlurmctldPidFile=$STATE/run/slurmctld.own.pid
SlurmdPidFile=$STATE/run/slurmd-%n.own.pid
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd-%n.log
# A node's processes are all that its /proc shows: no cgroups, no binding.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
ReturnToService=2
SlurmdTimeout=$NODE_TIMEOUT_S
MessageTimeout=10
TCPTimeout=2
KillWait=5
OverTimeLimit=0
CompleteWait=0
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$NET.254
AccountingStoragePort=$((PORT + 2))
# Not a password: where the connection to slurmdbd, which ignores AuthInfo, finds munge.
AccountingStoragePass=$STATE/run/munge.sock
AccountingStorageTRES=gres/gpu
# Nodes claim more than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-$n] NodeAddr=$NET.[1-$n] CPUs=$CPUS CoresPerSocket=$CPUS RealMemory=$MEMORY_MB Gres=gpu:$GPUS
PartitionName=main Nodes=node[1-$n] Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=node[1-$n] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE_S
$EXTRA
EOF
}

# ---- network ---------------------------------------------------------------------------------------------------------

link_of() { echo "$BRIDGE-${1#node}"; }
space_of() { echo "$BRIDGE-$1"; }

plug_in() {  # no default route and no uplink
    local link space
    link=$(link_of "$1") space=$(space_of "$1")
    ip netns add "$space"
    ip link add "$link" type veth peer name eth0 netns "$space"
    ip link set "$link" master "$BRIDGE" up
    ip -n "$space" addr add "$NET.${1#node}/24" dev eth0
    ip -n "$space" link set lo up
    ip -n "$space" link set eth0 up
}

unplug() {
    ip link del "$(link_of "$1")" 2>/dev/null || true
    ip netns del "$(space_of "$1")" 2>/dev/null || true  # it goes with its last process
}

set_link() {
    pid_of "$1" >/dev/null || die "$1 is not running"
    ip link set "$(link_of "$1")" "$2"
}

# ---- daemons ---------------------------------------------------------------------------------------------------------

start_munge() {
    dd if=/dev/urandom of="$STATE/etc/munge.key" bs=128 count=1 status=none
    chmod 600 "$STATE/etc/munge.key"
    # One for all: a socket file is in reach of every network namespace.
    spawn munged munged --foreground --num-threads=4 --key-file="$STATE/etc/munge.key" \
        --socket="$STATE/run/munge.sock" --pid-file="$STATE/run/munged.own.pid" --seed-file="$STATE/etc/munge.seed"
    wait_for 10 munged munge -n --socket="$STATE/run/munge.sock"
}

start_accounting() {
    mariadb-install-db --no-defaults --datadir="$STATE/db" --user=root --skip-test-db \
        --auth-root-authentication-method=normal >"$STATE/log/mariadb-install.out" 2>&1
    # Root's alone: its socket lies in a directory of mode 0700, and it has no network.
    spawn mariadbd mariadbd --no-defaults --user=root --datadir="$STATE/db" --skip-networking \
        --socket="$STATE/db/mysqld.sock" --pid-file="$STATE/run/mariadbd.own.pid" \
        --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0
    wait_for 60 mariadbd mariadb-admin --no-defaults --socket="$STATE/db/mysqld.sock" -uroot ping
    spawn slurmdbd slurmdbd -D
    wait_for 60 slurmdbd sacctmgr -n show cluster
    sacctmgr -i add cluster ddpasr >/dev/null
}

start_controller() {  # which insists on running on the host that slurm.conf names, and looks its name up
    spawn slurmctld unshare --uts --mount bash -c 'echo head >/proc/sys/kernel/hostname
                 mount --bind "$1/hosts" /etc/hosts
                 exec slurmctld -D' bash "$STATE/etc"
    wait_for 60 slurmctld scontrol ping
}

# The first process of the PID namespace only reaps what it inherits. With unshare the kernel kills it (--kill-child),
# and with it the whole "host".
start_node() {
    local node=$1
    shift
    mkdir -p "$STATE/spool/$node"
    spawn "$node" ip netns exec "$(space_of "$node")" unshare --uts --pid --fork --mount --mount-proc --kill-child \
        bash -c 'echo "$1" >/proc/sys/kernel/hostname
                 for file in hosts resolv.conf; do mount --bind "$2/$file" "/etc/$file"; done
                 slurmd -D "${@:3}" &
                 while :; do sleep infinity; done' bash "$node" "$STATE/etc" "$@"
}

state_of() { sinfo -h -N -n "$1" -p main -o %T; }
registered() { scontrol show node "$1" | grep -o 'SlurmdStartTime=[^ ]*'; }
# Registered anew, as slurmctld may not have missed it yet; and not just idle, as a waiting job may start at once.
back_since() { [[ $(registered "$1") != "$2" && $(state_of "$1") =~ ^(idle|mixed|allocated)$ ]]; }
all_idle() { [[ $(sinfo -h -p main -t idle -o %D) == "$(cat "$STATE/n")" ]]; }

# ---- commands --------------------------------------------------------------------------------------------------------

cmd_check() { check_machine; }

cmd_up() {
    local n=${1:-4} node since
    [[ $n =~ ^[1-9][0-9]*$ ]] && ((n <= 200)) || die "up [N]: N is a number from 1 to 200, not '$n'"
    if is_up; then say "already up with $(cat "$STATE/n") nodes ($STATE)"; return; fi
    [[ ! -e $STATE ]] || die "$STATE is left from an earlier run: remove it with '$0 down'"
    check_machine
    begun=1
    trap 'say "up failed; the logs are in $STATE/log until: $0 down" >&2' EXIT
    mkdir -p "$STATE"/{etc,run,log,db,dev,ctld,spool}
    chmod 755 "$STATE" "$STATE"/{etc,run,dev,log,spool}
    chmod 700 "$STATE"/{db,ctld}
    install_packages
    since=$SECONDS
    make_bridge
    echo "$n" >"$STATE/n"
    write_names "$n"
    write_accounting_conf
    write_slurm_conf "$n"
    for node in $(nodes); do plug_in "$node"; done
    start_munge
    start_accounting
    start_controller
    for node in $(nodes); do start_node "$node"; done
    wait_for 60 "the nodes" all_idle
    trap - EXIT
    say "up after $((SECONDS - since)) s: $n nodes of $CPUS CPUs and $GPUS pretended GPUs; state and logs in $STATE"
}

cmd_down() {
    local node name
    [[ -e $STATE ]] || { say "not up: there is no $STATE"; return; }
    if [[ -f $STATE/n ]]; then
        for node in $(nodes); do
            stop "$node" KILL
            unplug "$node"
        done
        for name in slurmctld slurmdbd mariadbd munged; do stop "$name" TERM KILL; done
        ip link del "$BRIDGE" 2>/dev/null || true
    fi
    rm -rf "$STATE"
    say "down"
}

cmd_status() {
    local name
    is_up || { say "not up"; return 1; }
    for name in munged mariadbd slurmdbd slurmctld $(nodes); do
        say "$name: $(pid_of "$name" || echo "not running")"
    done
    sinfo -N -o '%8N %10P %12T %6c %8m %10G %E'
    squeue
}

cmd_env() { printf "export SLURM_CONF='%s' SLURM_CLUSTER_DIR='%s' SLURM_CLUSTER_NET='%s'\n" "$CONF" "$STATE" "$NET"; }

# First the link: no FIN and no RST of the dying may reach the others, who are to see what a power failure is, silence.
cmd_crash() {
    set_link "$1" down
    stop "$1" KILL
    unplug "$1"  # half-open connections must not live on into the next boot
    say "$1 is dead"
}

cmd_boot() {
    local before
    ! pid_of "$1" >/dev/null || die "$1 is running"
    before=$(registered "$1")
    unplug "$1"
    plug_in "$1"
    start_node "$1" -b  # -b: the host was rebooted
    wait_for 60 "$1" back_since "$1" "$before"
    say "$1 is $(state_of "$1")"
}

cmd_cut() { set_link "$1" down; say "$1 is cut off"; }
cmd_join() { set_link "$1" up; say "$1 is connected"; }

cmd_on() {
    local pid child
    pid=$(pid_of "$1") || die "$1 is not running"
    shift
    child=$(tr -d ' ' <"/proc/$pid/task/$pid/children")  # the host's first process is unshare's one child
    (($#)) || set -- bash
    exec nsenter -t "$child" --net --mount --uts --pid --wd="$PWD" -- "$@"
}

cmd_heal() {
    local node
    for node in $(nodes); do
        if pid_of "$node" >/dev/null; then
            set_link "$node" up
            [[ ! $(state_of "$node") =~ ^(idle|mixed|allocated|completing)$ ]] || continue
            stop "$node" KILL  # a lost node comes back by itself as well, but only after a minute
        fi
        cmd_boot "$node"
    done
    wait_for 60 "the nodes" all_idle
}

need_node() {
    [[ -f $STATE/n && $1 =~ ^node([1-9][0-9]*)$ ]] && ((BASH_REMATCH[1] <= $(cat "$STATE/n"))) ||
        die "no such node: ${1:-(none given)}"
}

export SLURM_CONF=$CONF
case ${1:-} in
    check | up | down | status | env | heal) "cmd_$1" "${@:2}" ;;
    crash | boot | cut | join | on) need_node "${2:-}"; "cmd_$1" "${@:2}" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
