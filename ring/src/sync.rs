//! The atomics of this crate: the standard ones, or loom's in a model run.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{fence, AtomicU32, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{fence, AtomicU32, Ordering};

/// A cell whose content is only ever moved in and out as a whole.
#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct Body<T>(loom::cell::UnsafeCell<T>);

/// A cell whose content is only ever moved in and out as a whole.
#[cfg(not(loom))]
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Body<T>(std::cell::UnsafeCell<T>);

impl<T: Copy> Body<T> {
    #[cfg(loom)]
    pub(crate) fn new(value: T) -> Self {
        Body(loom::cell::UnsafeCell::new(value))
    }

    /// Copies the content out with one volatile read.
    ///
    /// # Safety
    /// The cell must be mapped, and `T` must be valid for any bit pattern.
    pub(crate) unsafe fn get(&self) -> T {
        #[cfg(loom)]
        // SAFETY: loom hands a pointer to a live value and checks the access.
        return self.0.with(|p| unsafe { p.read_volatile() });
        #[cfg(not(loom))]
        // SAFETY: mapped and valid for any bits by the caller's promise.
        return unsafe { self.0.get().read_volatile() };
    }

    /// Stores `value` with one volatile write.
    ///
    /// # Safety
    /// The cell must be mapped and writable.
    pub(crate) unsafe fn set(&self, value: T) {
        #[cfg(loom)]
        // SAFETY: loom hands a pointer to a live value and checks the access.
        return self.0.with_mut(|p| unsafe { p.write_volatile(value) });
        #[cfg(not(loom))]
        // SAFETY: mapped and writable by the caller's promise.
        return unsafe { self.0.get().write_volatile(value) };
    }
}
