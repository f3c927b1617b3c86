//! The system calls that a host makes while it serves: all others are refused.
//!
//! The list is virtiofsd's, whose own function takes no additions, and what
//! placing threads and streaming messages need beside it.

use crate::fs::IOCTLS;
use libc::*;
use libseccomp_sys::*;
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
    // Guests: connections that are there, their doorbells.
    SYS_accept4,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_poll,
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
    SYS_sigaltstack,
    SYS_tgkill,
    SYS_tkill,
];

/// Calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLD: &[c_long] = &[SYS_epoll_create, SYS_epoll_wait, SYS_getdents, SYS_open, SYS_time, SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[c_long] = &[];

/// Refuses all other system calls, as `what` has it, for this thread and those that it starts.
///
/// # Errors
/// When the system has no seccomp.
pub fn enable(what: Seccomp) -> io::Result<()> {
    let action = match what {
        Seccomp::None => return Ok(()),
        Seccomp::Kill => SCMP_ACT_KILL_PROCESS,
        Seccomp::Log => SCMP_ACT_LOG,
        Seccomp::Trap => SCMP_ACT_TRAP,
    };
    // SAFETY: a filter of this function alone, released at its end.
    unsafe {
        let filter = seccomp_init(action);
        if filter.is_null() {
            return Err(io::Error::other("seccomp: no filter can be made"));
        }
        let result = fill(filter);
        seccomp_release(filter);
        result
    }
}

/// # Safety
/// `filter` must be a live filter.
unsafe fn fill(filter: scmp_filter_ctx) -> io::Result<()> {
    let checked = |code: c_int, what: &str| match code {
        0 => Ok(()),
        e => Err(io::Error::other(format!("seccomp: {what}: {}", io::Error::from_raw_os_error(-e)))),
    };
    for &call in ALLOWED.iter().chain(OLD) {
        // SAFETY: by this function's contract.
        checked(unsafe { seccomp_rule_add(filter, SCMP_ACT_ALLOW, call as c_int, 0) }, "a rule")?;
    }
    // What lsattr and chattr need of a file system, no other ioctl.
    for command in IOCTLS {
        let wanted = scmp_arg_cmp { arg: 1, op: scmp_compare::SCMP_CMP_EQ, datum_a: command.into(), datum_b: 0 };
        // SAFETY: by this function's contract; one comparison.
        checked(unsafe { seccomp_rule_add_array(filter, SCMP_ACT_ALLOW, SYS_ioctl as c_int, 1, &wanted) }, "a rule")?;
    }
    // A thread may have a working directory of its own, and nothing else.
    let own_directory =
        scmp_arg_cmp { arg: 0, op: scmp_compare::SCMP_CMP_EQ, datum_a: CLONE_FS as scmp_datum_t, datum_b: 0 };
    // SAFETY: by this function's contract; one comparison.
    unsafe {
        let unshare = SYS_unshare as c_int;
        checked(seccomp_rule_add_array(filter, SCMP_ACT_ALLOW, unshare, 1, &own_directory), "a rule")?;
        checked(seccomp_load(filter), "loading the filter")
    }
}
