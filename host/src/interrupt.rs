//! The signal that interrupts a stuck system call of a late request.

use std::io;
use std::sync::OnceLock;

/// The signal's number: a real-time signal, which few programs use. Its handler does nothing; it is installed without
/// SA_RESTART, so that a system call which can be interrupted returns EINTR.
pub fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 6
}

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the handler, unless the program has one of its own.
///
/// # Errors
/// The system refuses it.
pub fn install() -> io::Result<()> {
    static RESULT: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = RESULT.get_or_init(|| {
        // SAFETY: all-zero bytes are a valid `sigaction`; the handler does nothing.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal(), std::ptr::null(), &raw mut old) != 0 {
                return Err(*libc::__errno_location());
            }
            if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN {
                return Ok(());
            }
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(_) as usize;
            match libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) {
                0 => Ok(()),
                _ => Err(*libc::__errno_location()),
            }
        }
    });
    result.map_err(io::Error::from_raw_os_error)
}

/// Sends it to a thread of this process.
pub fn send(thread: libc::pid_t) {
    // SAFETY: a system call with numbers only; a thread that has gone is ESRCH.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
}
