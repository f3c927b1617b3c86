//! Opcodes of ours that a host answers beside those of FUSE. The ring's set-up message and the change events have theirs
//! beside their definitions.

/// Opcode of a request that the host's server answers with nothing done.
pub const OP_NOOP: u32 = 0x5446_0002;
/// Opcode whose reply is one `u64`: payload bytes that the host has copied.
pub const OP_COPIED: u32 = 0x5446_0003;
/// The first message of a streamed connection: its body is the [`JOIN_TOKEN_BYTES`] random bytes that all connections of
/// one guest have in common. A connection that does not begin so is a guest of its own.
pub const OP_JOIN: u32 = 0x5446_0004;
/// Bytes of [`OP_JOIN`]'s body.
pub const JOIN_TOKEN_BYTES: usize = 16;
