//! The system calls that a host makes while it serves: all others are refused.
//!
//! The list is virtiofsd's, and what placing threads and streaming messages need beside it.

use crate::fs::{FANOTIFY_FLAGS, IOCTLS};
use libc::*;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::io;
use tunnelfs_settings::Seccomp;

const ALLOWED: &[c_long] = &[
    // Files and names.
    SYS_close,
    SYS_copy_file_range,
    SYS_dup,
    SYS_fallocate,
    SYS_fchdir,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchownat,
    SYS_fcntl,
    SYS_fdatasync,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_flock,
    SYS_fremovexattr,
    SYS_fsetxattr,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_ftruncate,
    SYS_getdents64,
    SYS_getxattr,
    SYS_linkat,
    SYS_listxattr,
    SYS_lseek,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_name_to_handle_at,
    SYS_newfstatat,
    SYS_openat,
    SYS_openat2,
    SYS_open_by_handle_at,
    SYS_preadv,
    SYS_pread64,
    SYS_preadv2,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_pwrite64,
    SYS_read,
    SYS_readv,
    SYS_readlinkat,
    SYS_renameat,
    SYS_renameat2,
    SYS_removexattr,
    SYS_setxattr,
    SYS_statx,
    SYS_symlinkat,
    SYS_syncfs,
    SYS_umask,
    SYS_unlinkat,
    SYS_utimensat,
    SYS_write,
    SYS_writev,
    // Who creates them.
    SYS_setfsgid,
    SYS_setfsuid,
    SYS_capget,
    SYS_capset,
    SYS_getegid,
    SYS_geteuid,
    SYS_setgroups,
    SYS_setresgid,
    SYS_setresuid,
    // Guests: connections that are there, kicks and calls.
    SYS_accept4,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_poll,
    SYS_ppoll,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_shutdown,
    // Memory and threads.
    SYS_brk,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_clone,
    SYS_clone3,
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_gettimeofday,
    SYS_madvise,
    SYS_membarrier,
    SYS_mmap,
    SYS_mprotect,
    SYS_mremap,
    SYS_munmap,
    SYS_prctl,
    SYS_restart_syscall,
    SYS_rseq,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_sched_setaffinity,
    SYS_sched_yield,
    SYS_set_robust_list,
    SYS_signalfd4,
    SYS_sigaltstack,
    SYS_tgkill,
    SYS_tkill,
];

/// Calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLD: &[c_long] = &[SYS_epoll_create, SYS_epoll_wait, SYS_getdents, SYS_open, SYS_time, SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[c_long] = &[];

/// Refuses all other system calls, as `what` says, for this thread and those that it starts.
///
/// # Errors
/// When the system has no seccomp, or none for this architecture.
pub fn enable(what: Seccomp) -> io::Result<()> {
    let action = match what {
        Seccomp::None => return Ok(()),
        Seccomp::Kill => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Trap => SeccompAction::Trap,
    };
    let apply = || {
        let arch = TargetArch::try_from(std::env::consts::ARCH)?;
        let filter: BpfProgram = SeccompFilter::new(rules()?, action, SeccompAction::Allow, arch)?.try_into()?;
        seccompiler::apply_filter(&filter)
    };
    apply().map_err(|e: seccompiler::Error| io::Error::other(format!("seccomp: {e}; see --seccomp none")))
}

/// The allowed calls: an empty list of rules allows a call with any arguments.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules: BTreeMap<i64, _> = ALLOWED.iter().chain(OLD).map(|&call| (call, Vec::new())).collect();
    // What lsattr and chattr need of a file system, no other ioctl.
    let commands = IOCTLS.iter().map(|&command| {
        let wanted = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, command.into())?;
        SeccompRule::new(vec![wanted])
    });
    rules.insert(SYS_ioctl, commands.collect::<Result<_, _>>()?);
    // A thread may unshare its working directory, and nothing else.
    let own_directory = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, CLONE_FS as u64)?;
    rules.insert(SYS_unshare, vec![SeccompRule::new(vec![own_directory])?]);
    // Changes are watched by groups of one kind, with marks on single inodes.
    let one = |argument, value: u32| {
        let wanted = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into())?;
        SeccompRule::new(vec![wanted])
    };
    // Who asks how the host is.
    let option = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, SO_PEERCRED as u64)?;
    rules.insert(SYS_getsockopt, vec![SeccompRule::new(vec![option])?]);
    rules.insert(SYS_fanotify_init, vec![one(0, FANOTIFY_FLAGS)?]);
    rules.insert(SYS_fanotify_mark, vec![one(1, FAN_MARK_ADD)?, one(1, FAN_MARK_REMOVE)?]);
    // A limit may be read, not set: `prlimit64` without new values.
    let no_new_limit = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(SYS_prlimit64, vec![SeccompRule::new(vec![no_new_limit])?]);
    Ok(rules)
}
