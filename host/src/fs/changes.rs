//! What has changed in the share, as a guest is told it.

/// One change. Nodeids are those that look-ups gave out; 0 where the guest knows none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// One of [`tunnelfs_fuse_abi::changes::kind`].
    pub kind: u32,
    /// `S_IFMT` bits, if they are known.
    pub mode: u32,
    /// The directory that has or had `name`; of a change of data or attributes too, where it is known.
    pub parent: u64,
    /// What changed.
    pub node: u64,
    /// The directory that the entry was moved to.
    pub to_parent: u64,
    /// The entry's name.
    pub name: Vec<u8>,
    /// The name that it was moved to.
    pub to_name: Vec<u8>,
}

/// Takes changes; `false`: this one does not fit any more.
pub type ChangeSink<'a> = dyn FnMut(&Change) -> bool + 'a;
