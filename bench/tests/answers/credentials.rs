//! Who may do what, and what new files get: the kernel of the guest has checked already, and the host must neither
//! refuse what it has allowed nor forget what follows from it.

use crate::common::pair::{shell, Pair, Setup};
use crate::common::sys::{acl, copy_range, fallocate, get_xattr, link_open, mknod, set_xattr, tmpfile, Answer};
use crate::rig::as_user;
use nix::errno::Errno;
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{chown, DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

const USER: u32 = 1000;
const OTHER: u32 = 2000;
const GROUP: u32 = 3000;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn errno<T>(result: std::io::Result<T>) -> Answer<()> {
    result.map(drop).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
}

/// Mode, owner and group.
fn owned(path: &Path) -> (u32, u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.mode(), meta.uid(), meta.gid())
}

/// Both directories, open to everybody.
fn open_to_all(options: &[&str]) -> Option<Pair> {
    let pair = Setup::new()?.start(options, "");
    for dir in [pair.native(""), pair.on("")] {
        set_mode(&dir, 0o777);
    }
    Some(pair)
}

/// Root of a user namespace has all capabilities over what its user owns.
#[test]
fn root_of_a_user_namespace() {
    let Some(pair) = open_to_all(&[]) else { return };
    for script in [
        "mkdir -m 0555 d && unshare -Ur mkdir d/x && stat -c '%u %g %a' d/x",
        "mkdir -m 0555 e && unshare -Ur touch e/f && stat -c '%u %g %a' e/f",
        "mkdir -m 0555 g && unshare -Ur ln -s x g/l && unshare -Ur mkfifo g/p && stat -c '%u %g %F' g/l g/p",
        "mkdir -m 0755 h && touch h/f && ln h/f h/x && chmod 555 h && unshare -Ur mv h/f h/g && unshare -Ur rm h/g && ls h",
        "touch c && chmod 000 c && unshare -Ur sh -c 'echo x > c && cat c'",
        "mkdir -m 000 n && unshare -Ur sh -c 'mkdir n/a n/a/b && ls -R n && rm -r n/a'",
        "mkdir -m 0755 a && cp /bin/true a/t && chmod 111 a/t && a/t",
    ] {
        let script = format!("runuser -u nobody -- sh -c \"{script}\"");
        let (code, _) = pair.same_script(&script);
        assert_eq!(code, Some(0), "natively: {script}");
    }
}

/// Capabilities that an ordinary user was given.
#[test]
fn ambient_capabilities() {
    let Some(pair) = Pair::plain() else { return };
    let with = |capability: &str, command: &str| {
        let keep = format!("--inh-caps +{capability} --ambient-caps +{capability}");
        format!("setpriv --reuid {USER} --regid {USER} --clear-groups {keep} {command}")
    };
    let scripts = [
        format!("mkdir r && {} && stat -c '%u %g %a' r/f", with("dac_override", "touch r/f")),
        format!("{} && {} && ls r", with("dac_override", "mkdir r/d"), with("dac_override", "mv r/f r/d/g")),
        format!("echo x > s && chmod 600 s && {}", with("dac_override", "sh -c 'echo y >> s; cat s'")),
        with("dac_read_search", "sh -c 'cat s; echo z >> s'"),
        format!("touch o && {} && stat -c %a o", with("fowner", "chmod 640 o")),
        format!("{} && stat -c %Y o", with("fowner", "touch -d @5 o")),
        format!("{} && stat -c '%u %g' o", with("chown", "chown 7:8 o")),
        format!("mkdir -m 777 m && {} && stat -c '%F %t %T %u' m/null", with("mknod", "mknod m/null c 1 3")),
        format!("mkdir -m 1777 t && touch t/f && {} && ls t", with("fowner", "rm t/f")),
        // Without: refused as ever.
        format!("setpriv --reuid {USER} --regid {USER} --clear-groups touch r/no; echo $?; ls r"),
    ];
    for script in scripts {
        pair.same_script(&script);
    }
}

/// Root without its capabilities is a user like any other.
#[test]
fn root_without_capabilities() {
    let Some(pair) = Pair::plain() else { return };
    let bare = "setpriv --inh-caps=-all --bounding-set=-all";
    for script in [
        format!("mkdir -m 700 d && chown {USER}:{USER} d && {bare} touch d/f; echo $?; ls d"),
        format!("touch f && chown {USER} f && chmod 600 f && {bare} cat f; echo $?"),
        format!("{bare} touch g && {bare} chown {USER} g; echo $?; stat -c %u g"),
        format!("{bare} mknod n c 1 3; echo $?"),
    ] {
        pair.same_script(&script);
    }
}

/// More groups than any fixed array would hold.
#[test]
fn many_supplementary_groups() {
    let Some(pair) = Pair::plain() else { return };
    let groups: Vec<u32> = (GROUP..GROUP + 100).collect();
    pair.same("creating by the last of a hundred groups", |dir| {
        let shared = dir.join("shared");
        fs::create_dir(&shared).unwrap();
        chown(&shared, Some(0), Some(GROUP + 99)).unwrap();
        set_mode(&shared, 0o2770);
        as_user(USER, USER, &groups, || {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o2775).open(shared.join("f")).map(drop);
            let steps = [
                errno(file),
                errno(fs::create_dir(shared.join("d"))),
                mknod(&shared.join("p"), libc::S_IFIFO | 0o2666, 0),
                errno(std::os::unix::fs::symlink("f", shared.join("l"))),
                errno(fs::hard_link(shared.join("f"), shared.join("h"))),
                errno(chown(shared.join("f"), None, Some(GROUP + 50))),
            ];
            let names = ["f", "d", "p", "l", "h"];
            (steps, names.map(|n| fs::symlink_metadata(shared.join(n)).map(|_| owned(&shared.join(n))).ok()))
        })
    });
}

/// A setgid directory hands its group on; who is no member loses S_ISGID on an executable file.
#[test]
fn groups_of_new_files() {
    let Some(pair) = Pair::plain() else { return };
    pair.same("a setgid directory of a group that the caller is not in", |dir| {
        let shared = dir.join("shared");
        fs::create_dir(&shared).unwrap();
        chown(&shared, Some(0), Some(GROUP)).unwrap();
        set_mode(&shared, 0o2777);
        as_user(USER, USER, &[], || {
            let create = |name: &str, mode| {
                OpenOptions::new().write(true).create_new(true).mode(mode).open(shared.join(name)).unwrap();
                owned(&shared.join(name))
            };
            let files = [create("x", 0o2775), create("n", 0o2664), create("s", 0o6755), create("t", 0o1644)];
            fs::DirBuilder::new().mode(0o777).create(shared.join("d")).unwrap();
            let unnamed = tmpfile(&shared, 0o2771).map(|file| {
                link_open(&file, &shared.join("u")).unwrap();
                owned(&shared.join("u"))
            });
            (files, owned(&shared.join("d")), unnamed)
        })
    });
}

/// The mask of the caller, and the default ACL that takes its place.
fn modes_of_new_files(dir: &Path) -> Vec<(u32, [Answer<Vec<u8>>; 2])> {
    const NONE: u32 = u32::MAX;
    let lists: [&[(u16, u16, u32)]; 3] = [
        &[],
        &[(1, 7, NONE), (4, 0, NONE), (0x20, 5, NONE)],
        &[(1, 7, NONE), (2, 7, OTHER), (4, 5, NONE), (8, 6, GROUP), (0x10, 7, NONE), (0x20, 1, NONE)],
    ];
    let mut all = Vec::new();
    for (i, list) in lists.iter().enumerate() {
        let parent = dir.join(format!("{i}"));
        fs::create_dir(&parent).unwrap();
        set_mode(&parent, 0o777);
        if !list.is_empty() && set_xattr(&parent, "system.posix_acl_default", &acl(list), 0).is_err() {
            continue;
        }
        for mask in [0o000, 0o022, 0o077, 0o777] {
            let name = |kind: &str| parent.join(format!("{kind}{mask:o}"));
            let make = || {
                OpenOptions::new().write(true).create_new(true).mode(0o666).open(name("f")).unwrap();
                fs::DirBuilder::new().mode(0o777).create(name("d")).unwrap();
                mknod(&name("p"), libc::S_IFIFO | 0o640, 0).unwrap();
                if let Ok(file) = tmpfile(&parent, 0o664) {
                    link_open(&file, &name("t")).unwrap();
                }
            };
            std::thread::scope(|s| {
                s.spawn(|| {
                    // A mask of this thread's own.
                    // SAFETY: plain system calls.
                    unsafe { assert_eq!(libc::unshare(libc::CLONE_FS), 0) };
                    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mask));
                    make();
                });
            });
            for kind in ["f", "d", "p", "t"].map(name).iter().filter(|p| p.exists()) {
                let list = |which: &str| get_xattr(kind, &format!("system.posix_acl_{which}"));
                all.push((fs::metadata(kind).unwrap().mode(), [list("access"), list("default")]));
            }
        }
    }
    all
}

#[test]
fn masks_and_default_acls() {
    let Some(pair) = Pair::plain() else { return };
    pair.same("modes and ACLs", modes_of_new_files);
}

#[test]
fn chmod_and_acls_change_each_other() {
    const NONE: u32 = u32::MAX;
    let Some(pair) = Pair::plain() else { return };
    pair.same("mode and ACL", |dir| {
        let path = dir.join("f");
        fs::write(&path, "").unwrap();
        chown(&path, Some(USER), Some(GROUP)).unwrap();
        let with = |mask| acl(&[(1, 6, NONE), (2, 6, OTHER), (4, 4, NONE), (0x10, mask, NONE), (0x20, 0, NONE)]);
        let mut seen = Vec::new();
        let mut look = || seen.push((owned(&path), get_xattr(&path, "system.posix_acl_access")));
        set_xattr(&path, "system.posix_acl_access", &with(7), 0).unwrap();
        look();
        set_mode(&path, 0o2640);
        look();
        // Who sets an ACL and is not in the file's group loses S_ISGID.
        let by_user = as_user(USER, USER, &[], || set_xattr(&path, "system.posix_acl_access", &with(6), 0));
        look();
        // One that says no more than a mode is one.
        let minimal = acl(&[(1, 7, NONE), (4, 5, NONE), (0x20, 1, NONE)]);
        set_xattr(&path, "system.posix_acl_access", &minimal, 0).unwrap();
        look();
        let wrong = set_xattr(&path, "system.posix_acl_access", b"nonsense", 0);
        let on_a_file = set_xattr(&path, "system.posix_acl_default", &minimal, 0);
        (by_user, wrong, on_a_file, seen)
    });
}

/// One way to change a file's content.
type Change = (&'static str, fn(&Path) -> Answer<()>);

fn write_direct(path: &Path) -> Answer<()> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    let file = file.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap()))?;
    let layout = std::alloc::Layout::from_size_align(4096, 4096).unwrap();
    // SAFETY: an allocation of 4096 bytes, freed below; the call reads no more.
    unsafe {
        let buffer = std::alloc::alloc_zeroed(layout);
        let result = Errno::result(libc::pwrite(std::os::fd::AsRawFd::as_raw_fd(&file), buffer.cast(), 4096, 0));
        std::alloc::dealloc(buffer, layout);
        result.map(drop)
    }
}

fn write_mapped(path: &Path) -> Answer<()> {
    let file = writable(path)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of a file of at least a page, of which one byte is written before it is unmapped.
    unsafe {
        let area = mmap(None, 4096.try_into().unwrap(), protection, MapFlags::MAP_SHARED, &file, 0)?;
        area.as_ptr().cast::<u8>().write_volatile(7);
        munmap(area, 4096)?;
    }
    errno(file.sync_all())
}

fn writable(path: &Path) -> Answer<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap()))
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const CHANGES: &[Change] = &[
    ("write", |p| errno(writable(p)?.write_at(b"x", 0))),
    ("write nothing", |p| errno(writable(p)?.write_at(b"", 0))),
    ("append", |p| errno(std::io::Write::write_all(&mut OpenOptions::new().append(true).open(p).unwrap(), b"x"))),
    ("direct write", write_direct),
    ("mapped write", write_mapped),
    ("ftruncate", |p| errno(writable(p)?.set_len(5000))),
    ("ftruncate to the same size", |p| errno(writable(p)?.set_len(8192))),
    ("truncate", |p| nix::unistd::truncate(p, 100)),
    ("open and truncate", |p| errno(OpenOptions::new().write(true).truncate(true).open(p))),
    ("fallocate", |p| fallocate(&writable(p)?, 0, 0, 65_536)),
    ("fallocate beyond the end", |p| fallocate(&writable(p)?, libc::FALLOC_FL_KEEP_SIZE, 8192, 65_536)),
    ("punch a hole", |p| fallocate(&writable(p)?, PUNCH, 0, 4096)),
    ("zero a range", |p| fallocate(&writable(p)?, libc::FALLOC_FL_ZERO_RANGE, 0, 4096)),
    ("copy a range", |p| {
        let from = File::open(p.with_file_name("source")).unwrap();
        copy_range(&from, 0, &writable(p)?, 0, 4096).map(drop)
    }),
    ("open for writing only", |p| writable(p).map(drop)),
    ("new times", |p| errno(writable(p)?.set_modified(std::time::SystemTime::UNIX_EPOCH))),
    ("own group", |p| errno(chown(p, None, Some(USER)))),
    ("new mode", |p| errno(fs::set_permissions(p, Permissions::from_mode(0o4777)))),
];

/// What the guest sees at once, and what the host has.
struct Changed {
    result: Answer<()>,
    bytes: u64,
    seen: u32,
    there: u32,
}

impl std::fmt::Debug for Changed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, {} bytes, seen {:o}, there {:o}", self.result, self.bytes, self.seen, self.there)
    }
}

impl Changed {
    /// As it is natively, or safer where the host cannot know better.
    fn is_right(&self, native: &Changed, change: &str, uid: u32) -> bool {
        let cleared = native.there & 0o777;
        // Without group execution S_ISGID gives no rights. Natively it stays when the caller is in the group, which
        // these requests do not tell: not even the caller's ids, for the sake of idmapped mounts.
        let groupless = uid != 0 && WRITES.contains(&change) || NOT_TOLD.contains(&change);
        if groupless && native.there & 0o2010 == 0o2000 && self.there == native.there & !0o2000 {
            let seen = self.seen == self.there;
            return seen && (self.result, self.bytes) == (native.result, native.bytes);
        }
        let right = match change {
            // The bits stay natively; a mount writes such pages back later, in nobody's name.
            "mapped write" => [native.there, native.there & !0o4000, cleared].contains(&self.there),
            // Requests with which the kernel does not say whether the caller may keep the bits.
            change if uid == 0 && NOT_TOLD.contains(&change) => [native.there, cleared].contains(&self.there),
            _ => self.there == native.there,
        };
        right && self.seen == self.there && (self.result, self.bytes) == (native.result, native.bytes)
    }
}

const WRITES: &[&str] = &["write", "append", "direct write"];
const NOT_TOLD: &[&str] = &["fallocate", "fallocate beyond the end", "punch a hole", "zero a range", "copy a range"];

fn assert_privileges_end(options: &[&str], mount: &str) {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(options, mount);
    let mut wrong = Vec::new();
    for &(name, change) in CHANGES {
        // A user's write, an owner's, and root's, which keeps the bits.
        for (owner, uid) in [(0, USER), (USER, USER), (0, 0)] {
            for mode in [0o4777, 0o2777, 0o6777, 0o2767, 0o4775, 0o2666] {
                let run = |dir: &Path| {
                    let (path, source) = (dir.join("f"), dir.join("source"));
                    fs::write(&source, [1; 8192]).unwrap();
                    fs::write(&path, [2; 8192]).unwrap();
                    chown(&path, Some(owner), Some(USER)).unwrap();
                    set_mode(&path, mode);
                    // As a program that has looked before.
                    assert_eq!(owned(&path).0 & 0o7777, mode);
                    let result = as_user(uid, uid, &[], || change(&path));
                    let seen = fs::metadata(&path).unwrap();
                    let behind = if dir == pair.guest.point { pair.behind("f") } else { path.clone() };
                    let there = fs::metadata(behind).unwrap().mode() & 0o7777;
                    fs::remove_file(&path).unwrap();
                    Changed { result, bytes: seen.len(), seen: seen.mode() & 0o7777, there }
                };
                let (native, mounted) = (run(&pair.native("")), run(&pair.guest.point));
                if !mounted.is_right(&native, name, uid) {
                    wrong.push(format!("{name} by {uid} of {owner}'s {mode:o}: {mounted:?}, natively {native:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// chown(2) to -1 and -1 changes no owner, but is a chown.
#[test]
fn an_owner_that_stays() {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(&[], "");
    pair.same("chown to -1, -1", |dir| {
        ["program", "folder"].map(|name| {
            let path = dir.join(name);
            if name == "folder" { fs::create_dir(&path) } else { fs::write(&path, "x") }.unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o6777)).unwrap();
            let before = fs::metadata(&path).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            chown(&path, None, None).unwrap();
            let after = fs::metadata(&path).unwrap();
            let newer = (after.ctime(), after.ctime_nsec()) > (before.ctime(), before.ctime_nsec());
            (after.mode(), newer, after.mtime() == before.mtime())
        })
    });
}

/// Else a program that a user has overwritten runs as its owner.
#[test]
fn changed_programs_lose_their_privileges() {
    assert_privileges_end(&[], "");
}

#[test]
fn changed_programs_lose_their_privileges_with_writeback() {
    assert_privileges_end(&["--cache=always", "--writeback"], "writeback");
}

#[test]
fn changed_programs_lose_their_privileges_without_caches() {
    assert_privileges_end(&["--cache=never", "--allow-mmap"], "");
}

#[test]
fn changed_programs_lose_their_privileges_without_the_hosts_help() {
    assert_privileges_end(&["--no-killpriv-v2"], "");
}

/// File capabilities go with the content that had them.
#[test]
fn changed_programs_lose_their_capabilities() {
    let Some(pair) = Pair::plain() else { return };
    // `struct vfs_cap_data`, revision 2: cap_net_raw, permitted and effective.
    let capability: Vec<u8> = [0x0200_0001u32, 1 << 13, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
    // Natively a mapped write leaves them; a mount writes the page back in nobody's name.
    for &(name, change) in CHANGES.iter().filter(|(name, _)| *name != "mapped write") {
        pair.same(name, |dir| {
            let path = dir.join("f");
            fs::write(dir.join("source"), [1; 8192]).unwrap();
            fs::write(&path, [2; 8192]).unwrap();
            chown(&path, Some(USER), Some(USER)).unwrap();
            set_mode(&path, 0o777);
            let set = set_xattr(&path, "security.capability", &capability, 0);
            let result = as_user(USER, USER, &[], || change(&path));
            let left = get_xattr(&path, "security.capability").map(|v| v.len());
            fs::remove_file(&path).unwrap();
            (set, result, left)
        });
    }
}

/// chown(2)'s own rules.
#[test]
fn owners_and_groups_change_as_allowed() {
    let Some(pair) = Pair::plain() else { return };
    pair.same("chown", |dir| {
        let path = dir.join("f");
        let mut seen = Vec::new();
        for mode in [0o6755, 0o2644, 0o6777] {
            for (uid, to) in [(0, (Some(USER), Some(GROUP))), (USER, (None, Some(GROUP))), (USER, (None, Some(OTHER)))]
            {
                fs::write(&path, "").unwrap();
                chown(&path, Some(USER), Some(USER)).unwrap();
                set_mode(&path, mode);
                let result = as_user(uid, uid, &[GROUP], || errno(chown(&path, to.0, to.1)));
                seen.push((result, owned(&path)));
            }
        }
        seen
    });
}

/// Several users at work in one directory at once: each owns what it has made.
#[test]
fn users_beside_each_other() {
    let Some(pair) = open_to_all(&[]) else { return };
    std::thread::scope(|s| {
        for user in 0..4u32 {
            let dir = pair.guest.point.clone();
            s.spawn(move || {
                as_user(USER + user, GROUP + user, &[], || {
                    for i in 0..100 {
                        let path = dir.join(format!("{user}-{i}"));
                        fs::write(&path, "x").unwrap();
                        assert_eq!(owned(&path).1, USER + user);
                        fs::create_dir(path.with_extension("d")).unwrap();
                    }
                });
            });
        }
    });
    for entry in fs::read_dir(pair.behind("")).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let user: u32 = name.split('-').next().unwrap().parse().unwrap();
        let meta = entry.metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (USER + user, GROUP + user), "{name}");
    }
}

/// What runs with set-user-id on the mount has its owner's rights there.
#[test]
fn programs_run_as_their_owner() {
    let Some(pair) = open_to_all(&[]) else { return };
    pair.same_script(&format!(
        "cp \"$(command -v id)\" i && chown {USER}:{GROUP} i && chmod 6755 i && ./i -u && ./i -g; \
         setpriv --reuid {OTHER} --regid {OTHER} --clear-groups ./i -u"
    ));
    assert_eq!(shell(&pair.guest.point, "./i -u").1, USER.to_string());
}
