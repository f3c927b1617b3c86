# Two commands do everything: `make bench` and `make test`.
.PHONY: all record deps deps-conformance conformance kills soak bench bench-full bench-calls bench-mount bench-tree test check audit lint fuzz sanitize mutants install uninstall deb static vm vm-test vm-test-quick vm-boot-root vm-bench

all: bench

# C libraries, python3 for the scripts, and stock virtiofsd 1.14.0 as a peer to measure against.
deps: .deps/bin/virtiofsd

.deps/c-libraries:
	@mkdir -p .deps
	@if ! { test -e /usr/include/cap-ng.h && test -e /usr/include/seccomp.h && which python3 >/dev/null; }; then \
	  echo "installing libcap-ng-dev, libseccomp-dev and python3 (as root, by apt-get)"; \
	  apt-get update -qq && apt-get install -y -qq libcap-ng-dev libseccomp-dev python3; fi
	@touch $@

.deps/bin/virtiofsd: .deps/c-libraries
	cargo install virtiofsd --version 1.14.0 --locked --root .deps --quiet

# Test suites of others, and the programs that tests let work on mounts.
deps-conformance: .deps/bin/pjdfstest .deps/bin/fsx

.deps/conformance-packages:
	@mkdir -p .deps
	@if ! { test -e /usr/include/sys/acl.h && which sqlite3 git tar fio mkfs.ext4 mkfs.btrfs >/dev/null; }; then \
	  echo "installing libacl1-dev, sqlite3, git, tar, fio, e2fsprogs and btrfs-progs (as root, by apt-get)"; \
	  apt-get update -qq && apt-get install -y -qq libacl1-dev sqlite3 git tar fio e2fsprogs btrfs-progs; fi
	@touch $@

.deps/bin/pjdfstest: | .deps/conformance-packages
	cargo install pjdfstest --version 0.2.2 --locked --root .deps --quiet

.deps/bin/fsx: | .deps/conformance-packages
	cargo install fsx --version 0.3.2 --locked --root .deps --quiet

# Where runs go: nothing in git changes unless RESULTS=results, as `make record` has it.
RESULTS ?= target/bench

# The quick matrix, under a minute after building; needs no root.
bench: deps
	cargo build --release --workspace
	@mkdir -p $(RESULTS) target/bench
	./target/release/tunnelfs-bench all --quick --json $(RESULTS)/quick.json --report $(RESULTS)/quick.md
	./target/release/tunnelfs-bench report $(RESULTS)/quick.json --output target/bench/quick.html

# The full matrix, about 10 minutes.
bench-full: deps
	cargo build --release --workspace
	@mkdir -p $(RESULTS)
	./target/release/tunnelfs-bench all --json $(RESULTS)/full.json --report $(RESULTS)/full.md

# What each operation costs in the host, beside the bare system calls that it needs: half a minute after building.
bench-calls: deps
	cargo build --release --workspace
	@mkdir -p $(RESULTS)
	./target/release/tunnelfs-bench calls --directory /dev/shm --directory target --report $(RESULTS)/calls.md

# Real mounts against others', about 25 minutes; needs root, /dev/fuse, and fio for all of its jobs.
HP = .deps/bin/passthrough_hp --foreground --nopassthrough --nocache -o allow_other
bench-mount: deps .deps/bin/passthrough_hp
	cargo build --release --workspace
	@mkdir -p $(RESULTS)
	./target/release/tunnelfs-bench mount --json $(RESULTS)/mount.json --report $(RESULTS)/mount.md \
	  --peer "hp-fuse=$(HP) {src} {mnt}" --peer "hp-uring=$(HP) -o io_uring,io_uring_q_depth=16 {src} {mnt}"

# Programs on trees of small files, about a quarter of an hour; needs root, /dev/fuse, git and cc.
bench-tree: deps .deps/bin/passthrough_hp
	cargo build --release --workspace
	@mkdir -p $(RESULTS)
	./target/release/tunnelfs-bench tree --json $(RESULTS)/tree.json --report $(RESULTS)/tree.md \
	  --peer "hp=.deps/bin/passthrough_hp --foreground --nopassthrough {src} {mnt}"

# All runs that are kept in git, nearly an hour on a quiet machine: commit what it writes.
record:
	$(MAKE) RESULTS=results bench bench-full bench-calls bench-mount bench-tree

# libfuse's fastest pass-through, as a peer.
.deps/bin/passthrough_hp:
	./bench/peers/passthrough_hp.sh $@

# All tests, also when some fail; at the end what passed, failed and was skipped, and why. TESTS="mount ring" runs those
# whose program or name has one of these words. With CI=true a test that cannot run for want of a program has failed.
test: deps deps-conformance
	./.ci/test $(TESTS)

# All of pjdfstest, fsx and the programs on every channel, transport and cache mode; as root, some hours.
conformance: deps deps-conformance
	cargo build --release --workspace
	cargo test --release -p tunnelfs-bench --test conformance -- --include-ignored --skip soak:: --test-threads 2 --nocapture
	cargo test --release -p tunnelfs-bench --test coherence -- --include-ignored --test-threads 1 --nocapture
	cargo test --release -p tunnelfs-bench --test differential -- --ignored --nocapture

# All kinds of mounts under loads that check their bytes, with kills and restarts, at random from SEED, for SOAK_SECONDS
# (half an hour by default); as root. What the processes held is recorded in target/tmp.
soak: deps deps-conformance
	cargo build --release --workspace
	cargo test --release -p tunnelfs-bench --test conformance -- --ignored --exact soak::as_long_as_told --nocapture

# Fifty hosts killed under fio, fsx and a log, on each channel and transport: about 5 minutes; as root.
kills: deps deps-conformance
	cargo build --release --workspace
	cargo test --release -p tunnelfs-bench --test faults kills -- --ignored --test-threads 1 --nocapture

# Format, clippy, circles among files, dependencies, models, corpora and some mutants: all that is not a test of behaviour.
# CHECKS="format clippy" runs some.
check: deps .deps/bin/cargo-deny
	./.ci/check $(CHECKS)

# Licences, sources and advisories of the dependencies.
audit: .deps/bin/cargo-deny
	./.ci/audit

.deps/bin/cargo-deny:
	cargo install cargo-deny --version 0.20.2 --locked --root .deps --quiet

lint: deps
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet

# FUZZ_SECONDS for each target, ten minutes by default; with FUZZ_KEEP=1 what is found goes into fuzz/corpus.
fuzz: deps
	./fuzz/run

# Under the address and thread sanitizers, and miri where there is one.
sanitize: deps
	./.ci/sanitize

# Takes one check out at a time, and expects the attack on it to be noticed. About 50 minutes beside others' work.
mutants: deps
	./.ci/mutants

# After `cargo build --release`. DESTDIR and SBINDIR are for packagers: mount(8) looks for its helpers in /sbin. The
# programs are stripped; STRIP=: leaves them.
PREFIX ?= /usr/local
SBINDIR ?= /sbin
BIN ?= target/release
STRIP ?= strip
PROGRAMS = tunnelfs-host tunnelfs-guest tunnelfs-bench
SERVED = tunnelfs-host tunnelfs-guest
HELPERS = mount.tunnelfs mount.fuse.tunnelfs
UNITS = tunnelfs-host@.service tunnelfs-host@.socket
UNITDIR = $(PREFIX)/lib/systemd/system
DOC = $(PREFIX)/share/doc/tunnelfs
MAN = $(PREFIX)/share/man/man8
BASH = $(PREFIX)/share/bash-completion/completions
ZSH = $(PREFIX)/share/zsh/site-functions
FISH = $(PREFIX)/share/fish/vendor_completions.d
PAGES = tunnelfs-host.8 tunnelfs-guest.8 tunnelfs-guest-mount.8

install:
	@test -x $(BIN)/tunnelfs-guest || { echo "$(BIN) has no programs: run cargo build --release first"; exit 1; }
	install -d $(DESTDIR)$(SBINDIR) $(DESTDIR)$(UNITDIR) $(DESTDIR)$(MAN) $(DESTDIR)$(BASH) $(DESTDIR)$(ZSH) $(DESTDIR)$(FISH)
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(PROGRAMS:%=$(BIN)/%)
	$(STRIP) $(PROGRAMS:%=$(DESTDIR)$(PREFIX)/bin/%)
	for name in $(HELPERS); do ln -sf $(PREFIX)/bin/tunnelfs-guest $(DESTDIR)$(SBINDIR)/$$name; done
	for unit in $(UNITS); do sed 's|@PREFIX@|$(PREFIX)|' host/packaging/$$unit > $(DESTDIR)$(UNITDIR)/$$unit; done
	install -D -m 644 host/packaging/tunnelfs.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/tunnelfs.conf
	install -D -m 644 host/packaging/tunnelfs.tmpfiles $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/tunnelfs.conf
	for program in $(SERVED); do \
	  $(BIN)/$$program man > $(DESTDIR)$(MAN)/$$program.8 && \
	  $(BIN)/$$program completions bash > $(DESTDIR)$(BASH)/$$program && \
	  $(BIN)/$$program completions zsh > $(DESTDIR)$(ZSH)/_$$program && \
	  $(BIN)/$$program completions fish > $(DESTDIR)$(FISH)/$$program.fish || exit 1; done
	$(BIN)/tunnelfs-guest man mount > $(DESTDIR)$(MAN)/tunnelfs-guest-mount.8
	install -D -m 644 -t $(DESTDIR)$(DOC) README.md CHANGELOG.md SECURITY.md LICENSE LICENSE-APACHE LICENSE-MIT \
	  docs/*.md docs/tunnelfs.toml

uninstall:
	rm -f $(PROGRAMS:%=$(DESTDIR)$(PREFIX)/bin/%) $(HELPERS:%=$(DESTDIR)$(SBINDIR)/%) $(UNITS:%=$(DESTDIR)$(UNITDIR)/%) \
	  $(PAGES:%=$(DESTDIR)$(MAN)/%) $(SERVED:%=$(DESTDIR)$(BASH)/%) $(SERVED:%=$(DESTDIR)$(ZSH)/_%) \
	  $(SERVED:%=$(DESTDIR)$(FISH)/%.fish) \
	  $(DESTDIR)$(PREFIX)/lib/sysusers.d/tunnelfs.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/tunnelfs.conf
	rm -rf $(DESTDIR)$(DOC)

# A Debian package in target/deb.
deb:
	cargo build --release --workspace
	./host/packaging/deb

# What the virtual machines want: QEMU and the parts of small file systems, and one file of the guest.
.deps/vm-tools:
	@mkdir -p .deps
	apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	  qemu-system-x86 busybox-static cpio kmod zstd xz-utils fio binutils python3
	@touch $@

# tunnelfs-guest in one file that needs no library: for any guest, and for an initramfs.
STATIC = x86_64-unknown-linux-gnu
static:
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --target $(STATIC) -p tunnelfs-guest

vm: deps .deps/vm-tools static
	cargo build --release -p tunnelfs-host

# Real guests under QEMU: kernels 6.1, 6.12 and 7.3, about 8 minutes; quick: 7.3 alone, about 2.
vm-test: vm
	./bench/vm/test.py
vm-test-quick: vm
	./bench/vm/test.py --quick

# A VM whose root file system is a shared directory.
vm-boot-root: vm
	./bench/vm/boot_root.py

# Against the kernel's virtiofs and 9p, in one boot, about 14 minutes.
vm-bench: vm
	@mkdir -p $(RESULTS)
	./bench/vm/bench.py --json $(RESULTS)/vm.json --report $(RESULTS)/vm.md
