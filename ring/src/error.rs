//! What can go wrong on a ring.

/// An error of the ring, its memory or its configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer broke the protocol; the queue must not be used any more.
    #[error("the peer corrupted the ring: {0}")]
    Corrupt(&'static str),
    /// The peer's process has ended, or has dropped its end.
    #[error("the peer has gone away")]
    PeerGone,
    /// Nothing came in time.
    #[error("the peer did not answer in time")]
    TimedOut,
    /// Bytes that do not all lie in a payload buffer.
    #[error("bytes {at}..{} of a buffer of {size}", at.saturating_add(*len))]
    OutOfRange {
        /// Where they begin.
        at: usize,
        /// How many there are.
        len: usize,
        /// Bytes of the buffer.
        size: usize,
    },
    /// A message longer than an entry's, or a payload longer than it may be.
    #[error("{what} of {len} bytes: at most {most}")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its bytes.
        len: usize,
        /// The most bytes that it may have.
        most: usize,
    },
    /// A hand-off that is none, or whose parts do not belong together.
    #[error("the hand-off cannot be used: {0}")]
    Handoff(&'static str),
    /// A geometry that the layout cannot carry.
    #[error("{key} = {value}: {allowed}")]
    Geometry {
        /// The setting's name.
        key: &'static str,
        /// The refused value.
        value: u64,
        /// What would be accepted.
        allowed: String,
    },
    /// The operating system refused a memory or descriptor call.
    #[error("{what}: {source}")]
    Os {
        /// What was attempted.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl From<Error> for std::io::Error {
    fn from(e: Error) -> Self {
        use std::io::ErrorKind;
        let kind = match &e {
            Error::Corrupt(_) | Error::Handoff(_) => ErrorKind::InvalidData,
            Error::PeerGone => ErrorKind::BrokenPipe,
            Error::TimedOut => ErrorKind::TimedOut,
            Error::OutOfRange { .. } | Error::TooLong { .. } | Error::Geometry { .. } => ErrorKind::InvalidInput,
            Error::Os { source, .. } => source.kind(),
        };
        std::io::Error::new(kind, e)
    }
}
