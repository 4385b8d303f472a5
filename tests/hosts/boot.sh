#!/bin/bash
# Process 1 of an isolated host, which machines.py starts in namespaces of its own, with the variables HOST_* that are used here.
# Says "ready" when the host answers to ssh.
set -euo pipefail
mount --make-rprivate /
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777,size=12g shm /dev/shm
mkdir -p /run/sshd /run/disk /run/keys
cp "$HOST_KEYS"/* /run/keys
chmod 600 /run/keys/*

# /root and /tmp lie on the host's own disk, which outlives it as the disk of a machine that loses power does. Of what they hide,
# the shared folder stays in sight, and the code and the Python that are tested, which nobody can write to.
mount --bind "$HOST_DISK" /run/disk
mkdir -p /run/disk/root /run/disk/tmp
chmod 700 /run/disk/root
chmod 1777 /run/disk/tmp
show() { # FOLDER rw|ro
  local at=$1
  [[ $1 != /root/* && $1 != /tmp/* ]] || at=/run/disk$1
  mkdir -p "$at"
  mount --bind "$1" "$at"
  mount -o "remount,bind,$2" "$at"
}
show "$HOST_SHARED" rw
for folder in "$HOST_IMAGE" "$HOST_CODE" "$HOST_VENV" "$HOST_PYTHON"; do
  show "$folder" ro
done
mount --rbind /run/disk/root /root
mount --rbind /run/disk/tmp /tmp

# Ray looks its own name up, and asks for a route outwards to learn its address: without an answer it waits for time-outs.
hostname "$HOST_NAME"
printf '127.0.0.1 localhost\n%s %s\n' "$HOST_IP" "$HOST_NAME" >/run/hosts
mount --bind /run/hosts /etc/hosts
echo 'options timeout:1 attempts:1' >/run/resolv
names=$(readlink -m /etc/resolv.conf)
mkdir -p "${names%/*}"
[ -e "$names" ] || touch "$names"
mount --bind /run/resolv "$names"
until ip link show dev eth0 >/dev/null 2>&1; do sleep 0.02; done # the switch plugs it in
ip link set lo up
ip addr add "$HOST_IP/24" dev eth0
ip link set eth0 up
ip route add default via "$HOST_GATEWAY" dev eth0

export HOME=/root
cd /root
mkdir -p .ssh
cp /run/keys/id.pub .ssh/authorized_keys
if [ "$HOST_NAME" = ctl ]; then # where the user sits: csm's own environment, and the key to the others
  cp /run/keys/id .ssh/id
  cp "$HOST_IMAGE/.csm_env" .csm_env
  echo ". ~/.csm_env; export PATH=$HOST_VENV/bin:\$PATH PYTHONPATH=$HOST_CODE" >.bashrc
elif [ ! -e csm-venv ]; then
  cp -a "$HOST_IMAGE/." .
fi

cat >/run/sshd_config <<CONFIG
ListenAddress $HOST_IP
HostKey /run/keys/host
AuthorizedKeysFile .ssh/authorized_keys
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile /run/sshd.pid
MaxStartups 100
MaxSessions 100
CONFIG
/usr/sbin/sshd -f /run/sshd_config -E /run/sshd.log
echo ready
exec >/dev/null
while :; do
  sleep infinity & wait $! || true # a shell that waits buries the orphans
done
