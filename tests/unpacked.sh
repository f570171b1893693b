# To be sourced, in the root of the checkout.
#
# unpacked WHO NAME PACKAGE...: Debian's packages taken apart under target/NAME/root and not installed (an installed server would begin to serve).
# Debian's names: those of 12, or with t64 those of 13. Needs apt; no root, unless its lists are missing or so old that they name versions that are gone.
unpacked() {
    local who=$1 name=$2 package updated=
    shift 2
    command -v apt-get >/dev/null || { echo "$who: no apt-get here; install $1 by hand" >&2; return 1; }
    rm -rf "target/$name"
    mkdir -p "target/$name/packages" "target/$name/root"
    pushd "target/$name/packages" >/dev/null
    fetch() { apt-get -qq download "$1" 2>/dev/null || apt-get -qq download "${1}t64" 2>/dev/null; }
    for package; do
        fetch "$package" && continue
        if [ -z "$updated" ] && [ "$(id -u)" -eq 0 ]; then
            updated=yes
            apt-get -qq update || true
            fetch "$package" && continue
        fi
        echo "$who: apt cannot fetch $package (apt-get update?)" >&2
        popd >/dev/null
        rm -rf "target/$name"
        return 1
    done
    for package in *.deb; do dpkg-deb -x "$package" ../root; done
    popd >/dev/null
    # Where libraries were before /usr was merged.
    [ ! -d "target/$name/root/lib/x86_64-linux-gnu" ] ||
        cp -a "target/$name/root/lib/x86_64-linux-gnu/." "target/$name/root/usr/lib/x86_64-linux-gnu/"
}
