# What the guest serves to clients in the network, each server the distribution's own. $1: its address with prefix length; $2: the public key (ed25519, base64)
# that may log in as root. Ends when one of the servers does.
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
cd /run
ip link set lo up
ip addr add "$1" dev eth0
ip link set eth0 up

# Numbers, one a line, so many bytes a second: /cgi-bin/numbers?LAST,BYTES. Whoever reads them knows what must come.
mkdir -p www/cgi-bin sshd
cat > www/cgi-bin/numbers <<'END'
#!/bin/sh
printf 'Content-Type: text/plain\r\n\r\n'
seq 1 "${QUERY_STRING%,*}" | pv -q -L "${QUERY_STRING#*,}"
END
# What arrived of a POST, as its SHA-256.
cat > www/cgi-bin/digest <<'END'
#!/bin/sh
set -- $(sha256sum)
printf 'Content-Type: text/plain\r\n\r\n%s\n' "$1"
END
chmod 755 www/cgi-bin/*
busybox httpd -f -p 80 -h /run/www &

echo "ssh-ed25519 $2" > authorized_keys
ssh-keygen -q -t ed25519 -N '' -f host_key
# (/run is a directory of everybody here.)
/usr/sbin/sshd -D -e -f /dev/null -h /run/host_key -o AuthorizedKeysFile=/run/authorized_keys -o StrictModes=no \
  -o PidFile=none -o UsePAM=no -o PermitRootLogin=yes -o LogLevel=ERROR -o UseDNS=no -o LoginGraceTime=0 &

echo 'host all all all trust' > hba.conf
rm -f /work/postgres/postmaster.pid
setpriv --reuid=postgres --regid=postgres --clear-groups /usr/lib/postgresql/17/bin/postgres -D /work/postgres -k /run \
  -c listen_addresses='*' -c hba_file=/run/hba.conf -c log_min_messages=fatal &

iperf3 --server > /dev/null &

wait -n
echo "a server ended with status $?" >&2
exit 1
