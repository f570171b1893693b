# Understudy. `make` alone lists what there is.

CARGO   ?= cargo
BIN     := $(abspath $(or $(CARGO_TARGET_DIR),target))/debug
LAB     := $(BIN)/understudy-lab

PREFIX     ?= /usr
LIBEXECDIR ?= $(PREFIX)/libexec/understudy
OCFROOT    ?= /usr/lib/ocf
SBINDIR    ?= $(PREFIX)/sbin
TOOLS      := understudy-vmm understudy-replicator understudy-serial understudy-crm understudy-disk understudy-alert understudy-evacuator understudy-monitor

.DEFAULT_GOAL := help
.PHONY: help demo test lab-test bench fuzz lint build lab-root lab-guest lab-disk install clean prerequisites needs-root
.DELETE_ON_ERROR:

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: needs-root build lab-guest ## a Linux guest survives power cuts under Pacemaker: watch it (root)
	@mkdir -p target/demo
	$(LAB) vm run -- understudy-demo

test: prerequisites ## all tests, tier by tier: fast, kvm, lab
	tests/run

lab-test: needs-root build lab-guest lab-disk ## only the lab tier (root)
	$(LAB) vm run -- understudy-lab-tests

bench: needs-root build lab-guest lab-disk ## the figures; JSON under target/bench (BENCH=--quick: two minutes instead of fifteen)
	@mkdir -p target/bench
	$(CARGO) build --release --workspace --bins
	$(dir $(BIN))release/understudy-bench replication $(BENCH)
	$(dir $(BIN))release/understudy-bench disk $(BENCH)
	$(dir $(BIN))release/understudy-bench net $(BENCH)
	$(CARGO) run --release -p understudy-crm --example policy-bench -- target/lab/root > target/bench/policy.json
	$(dir $(BIN))release/understudy-bench host
	$(dir $(BIN))release/understudy-bench power-cuts
	$(dir $(BIN))release/understudy-bench power-cuts --nic --report target/bench/net-cuts.json
	$(dir $(BIN))release/understudy-bench cluster-cuts --count 12 --both 4 --sequence 4 --moves 4
	$(LAB) vm run -- understudy-bench lab
	UNDERSTUDY_BIN_DIR=$(dir $(BIN))release $(LAB) vm run -- understudy-bench disk-guest
	UNDERSTUDY_BIN_DIR=$(dir $(BIN))release $(LAB) vm run -- understudy-bench net-guest
	UNDERSTUDY_BIN_DIR=$(dir $(BIN))release $(LAB) vm run -- understudy-bench disk-cuts
	UNDERSTUDY_BIN_DIR=$(dir $(BIN))release $(LAB) vm run -- understudy-bench disk-cuts --unredirected --count 8 --both 0 --sequence 0 \
	  --moves 0 --missing 0 --full 0 --report target/bench/disk-cuts-unredirected.json
	UNDERSTUDY_BIN_DIR=$(dir $(BIN))release $(LAB) vm run -- understudy-bench connections
	UNDERSTUDY_BIN_DIR=$(dir $(BIN))release $(LAB) vm run -- understudy-bench connections --leak --primary 4 --standby 0 --moves 0 --paths 0 \
	  --uplinks 0 --pause-ms 100 --report target/bench/connections-leak.json

# What libFuzzer reads to learn which inputs reached something new; stable Rust passes it through. Integer overflow is a finding.
COVERAGE := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
            -Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1 -Coverflow-checks=on -Cdebug-assertions=on
FUZZ_SECONDS ?= 600

fuzz: prerequisites ## every parser under libFuzzer, FUZZ_SECONDS each (TARGETS="frame key" for some); needs a C++ compiler
	@command -v c++ >/dev/null || { echo "c++ is missing: libFuzzer is written in C++. Install with: apt-get install g++" >&2; exit 1; }
	RUSTFLAGS="$(COVERAGE)" $(CARGO) build --release --target-dir target/fuzz/build --target $$(rustc -vV | sed -n "s/host: //p") \
	  -p understudy-fuzz --features coverage --bin understudy-fuzz-coverage
	fuzz/run $(FUZZ_SECONDS) $(TARGETS)

lint: prerequisites ## rustfmt and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

build: prerequisites ## all executables (debug profile: what the tests use)
	$(CARGO) build --workspace --bins

lab-root: build ## the private Debian that the lab's nodes are made of, under target/lab (root)
	$(LAB) root

lab-guest: lab-root ## the demo guest's initramfs
	$(BIN)/understudy-initramfs --root target/lab/root --output target/lab/guest/initrd > target/lab/guest.json

lab-disk: lab-root ## the guest with databases and servers: its initramfs and its disk (apt, once)
	$(BIN)/understudy-initramfs --disk --root target/lab/root --output target/lab/guest/initrd-disk > target/lab/guest-disk.json
	$(LAB) guest-disk > /dev/null

install: prerequisites ## executables and agents into the system (PREFIX, DESTDIR)
	$(CARGO) build --workspace --bins --release
	install -d $(DESTDIR)$(LIBEXECDIR) $(DESTDIR)$(OCFROOT)/resource.d $(DESTDIR)$(SBINDIR)
	for tool in understudy-ocf $(TOOLS); do \
	  install -m 755 $(dir $(BIN))release/$$tool $(DESTDIR)$(LIBEXECDIR)/$$tool || exit 1; done
	for tool in $(TOOLS); do ln -sf $(LIBEXECDIR)/$$tool $(DESTDIR)$(SBINDIR)/$$tool || exit 1; done
	# The queue of alerts is Pacemaker's user's; packages for a DESTDIR make it when they are installed.
	if [ -z "$(DESTDIR)" ] && id hacluster >/dev/null 2>&1; then install -d -o hacluster -g haclient -m 0770 /var/spool/understudy/alerts; fi
	$(dir $(BIN))release/understudy-ocf install --ocf-root $(DESTDIR)$(OCFROOT) --executable $(LIBEXECDIR)/understudy-ocf

clean: ## everything that was built, the lab included
	-[ ! -x $(LAB) ] || $(LAB) down
	$(CARGO) clean
	rm -rf target

needs-root:
	@[ "$$(id -u)" -eq 0 ] || { echo "this needs root: the lab makes namespaces, mounts and bridges of its own (sudo make ...)" >&2; exit 1; }

# A Rust toolchain is asked for; the linker that rustc calls is fetched where that is possible.
prerequisites:
	@command -v $(CARGO) >/dev/null || { echo "cargo is missing: install a Rust toolchain (https://rustup.rs)" >&2; exit 1; }
	@command -v cc >/dev/null || if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing gcc, which rustc links with"; \
	  apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null; }; \
	else echo "cc is missing: rustc links with it. Install with: apt-get install gcc libc6-dev" >&2; exit 1; fi
