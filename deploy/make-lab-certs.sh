#!/bin/bash
# Makes the certificates for mutual TLS in a lab: a CA, a server certificate for the given names, a client certificate.
# Not for production: the CA's key lies next to the rest, and nothing is ever revoked.
set -euo pipefail

usage() {
    echo "usage: $0 DIR NAME...    NAME: what clients call the daemon, a DNS name or an IP address" >&2
    exit 2
}

[ $# -ge 2 ] || usage
dir=$1
shift

sans=
for name in "$@"; do
    if [[ $name =~ ^[0-9]+(\.[0-9]+){3}$ || $name =~ ^[0-9a-fA-F:]*:[0-9a-fA-F:.]*$ ]]; then
        sans+=${sans:+,}IP:$name
    elif [[ $name =~ ^(\*\.)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$ ]]; then
        sans+=${sans:+,}DNS:$name
    else
        echo "$0: '$name' is neither a DNS name nor an IP address" >&2
        exit 2
    fi
done

files=(ca.pem ca.key server.pem server.key client.pem client.key)
for file in "${files[@]}"; do
    if [ -e "$dir/$file" ]; then
        echo "$0: $dir/$file exists; move it away, or name another directory" >&2
        exit 1
    fi
done

# Keys are never readable by others, not even while they are being made.
umask 077
mkdir -p "$dir"
scratch=$(mktemp -d "$dir/.making.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

days=365
key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$scratch/$1.key"; }

# issue NAME SUBJECT EXTENSIONS: a certificate signed by the CA.
issue() {
    key "$1"
    openssl req -new -key "$scratch/$1.key" -subj "/CN=$2" -out "$scratch/$1.csr"
    openssl x509 -req -in "$scratch/$1.csr" -CA "$scratch/ca.pem" -CAkey "$scratch/ca.key" -days "$days" \
        -extfile <(printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" "${@:3}") \
        -out "$scratch/$1.pem" 2>"$scratch/log" || { cat "$scratch/log" >&2; exit 1; }
}

key ca
openssl req -x509 -new -key "$scratch/ca.key" -subj "/CN=pagewalk lab CA" -days "$days" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$scratch/ca.pem"
issue server "pagewalkd" "subjectAltName=$sans" "extendedKeyUsage=serverAuth"
issue client "pagewalk client" "extendedKeyUsage=clientAuth"

chmod 644 "$scratch"/*.pem
for file in "${files[@]}"; do
    mv -n "$scratch/$file" "$dir/$file"
done
cat <<END
made in $dir, valid for $days days, server names: $sans
  pagewalkd serve --listen ADDRESS:50051 --tls-cert $dir/server.pem --tls-key $dir/server.key --client-ca $dir/ca.pem
  pagewalk machines --addr NAME:50051 --tls-ca $dir/ca.pem --tls-cert $dir/client.pem --tls-key $dir/client.key
END
