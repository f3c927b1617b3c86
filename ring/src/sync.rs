//! The atomics of this crate: the standard ones, or loom's in a model run.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{fence, AtomicU32, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{fence, AtomicU32, Ordering};

/// What a ring carries.
///
/// # Safety
/// Plain integers, valid for any bit pattern, aligned to 4; four bytes and
/// then whole 8-byte words, for that is how it is copied.
pub unsafe trait Entry: Copy {
    /// Whether all that counts lies in the entry's first cache line.
    fn fits_first_line(&self) -> bool;
}

/// A cell whose content is only ever copied in and out.
#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct Body<T>(loom::cell::UnsafeCell<T>);

/// A cell whose content is only ever copied in and out.
#[cfg(not(loom))]
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Body<T>(std::cell::UnsafeCell<T>);

#[cfg(loom)]
impl<T: Entry> Body<T> {
    pub(crate) fn new(value: T) -> Self {
        Body(loom::cell::UnsafeCell::new(value))
    }

    /// # Safety
    /// The cell must be mapped.
    pub(crate) unsafe fn get(&self) -> T {
        // SAFETY: loom hands a pointer to a live value and checks the access.
        self.0.with(|p| unsafe { p.read_volatile() })
    }

    /// # Safety
    /// The cell must be mapped and writable.
    pub(crate) unsafe fn set(&self, value: &T) {
        // SAFETY: loom hands a pointer to a live value and checks the access.
        self.0.with_mut(|p| unsafe { p.write_volatile(*value) });
    }
}

/// Bytes of a body that share the first cache line with the sequence word.
pub(crate) const FIRST_LINE: usize = 60;

#[cfg(not(loom))]
impl<T: Entry> Body<T> {
    /// Copies the content out; each byte is read once. What `fits_first_line` says does not count stays zero.
    ///
    /// # Safety
    /// The cell must be mapped.
    pub(crate) unsafe fn get(&self) -> T {
        let mut value = std::mem::MaybeUninit::<T>::zeroed();
        let (from, to) = (self.0.get().cast::<u8>().cast_const(), value.as_mut_ptr().cast::<u8>());
        // SAFETY: mapped by the caller's promise; an `Entry` is valid for any bits.
        unsafe {
            copy_words(from, to, 0, size_of::<T>().min(FIRST_LINE));
            if size_of::<T>() > FIRST_LINE && !value.assume_init_ref().fits_first_line() {
                copy_words(from, to, FIRST_LINE, size_of::<T>());
            }
            value.assume_init()
        }
    }

    /// Copies `value` in, without what `fits_first_line` says does not count.
    ///
    /// # Safety
    /// The cell must be mapped and writable.
    pub(crate) unsafe fn set(&self, value: &T) {
        let end = if value.fits_first_line() { size_of::<T>().min(FIRST_LINE) } else { size_of::<T>() };
        let (from, to) = ((&raw const *value).cast::<u8>(), self.0.get().cast::<u8>());
        // SAFETY: mapped and writable by the caller's promise.
        unsafe {
            copy_words(from, to, 0, size_of::<T>().min(FIRST_LINE));
            if end > FIRST_LINE {
                copy_words(from, to, FIRST_LINE, end);
            }
        }
    }
}

/// Volatile copy of bytes `start..end` of an entry: byte by byte would be
/// what the compiler makes of a volatile structure.
///
/// # Safety
/// Both must be valid for `end` bytes.
#[cfg(not(loom))]
#[inline(always)]
unsafe fn copy_words(from: *const u8, to: *mut u8, start: usize, end: usize) {
    let mut at = start;
    if at == 0 {
        // SAFETY: an entry is aligned to 4 and not empty.
        unsafe { to.cast::<u32>().write_volatile(from.cast::<u32>().read_volatile()) };
        at = 4;
    }
    while at < end {
        // SAFETY: inside both; in shared memory the words behind the first four bytes are aligned to 8,
        // in private memory any alignment may be.
        unsafe { unaligned(to.add(at)).write_volatile(unaligned(from.add(at).cast_mut()).read_volatile()) };
        at += 8;
    }
}

/// An 8-byte word of any alignment.
#[cfg(not(loom))]
#[derive(Clone, Copy)]
#[repr(C, packed(4))]
struct UnalignedU64(u64);

#[cfg(not(loom))]
fn unaligned(p: *mut u8) -> *mut UnalignedU64 {
    p.cast()
}
