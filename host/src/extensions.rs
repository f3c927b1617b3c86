//! What the kernel may append to requests that create something
//! (`struct fuse_ext_header` of linux/fuse.h).

use crate::request::einval;
use std::io;
use virtiofsd::filesystem::Extensions;

/// `FUSE_EXT_GROUPS`: supplementary groups of the caller.
const GROUPS: u32 = 32;
/// Bytes of `struct fuse_ext_header`.
const HEADER: usize = 8;

/// Decodes the extensions behind a request's names.
///
/// # Errors
/// `EINVAL` when they are cut off, of an unknown kind or there twice.
pub fn decode(mut bytes: &[u8]) -> io::Result<Extensions> {
    let mut extensions = Extensions::default();
    while !bytes.is_empty() {
        let size = word(bytes, 0)? as usize;
        let body = bytes.get(HEADER..size).ok_or_else(einval)?;
        if word(bytes, 4)? != GROUPS || !extensions.sup_gids.is_empty() {
            return Err(einval());
        }
        // `struct fuse_supp_groups`: a count, then the groups.
        let groups = (1..=word(body, 0)? as usize).map(|i| word(body, 4 * i).map(Into::into));
        extensions.sup_gids = groups.collect::<io::Result<_>>()?;
        bytes = &bytes[size..];
    }
    Ok(extensions)
}

fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    let word = bytes.get(at..at + 4).ok_or_else(einval)?;
    Ok(u32::from_ne_bytes(word.try_into().expect("four bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    #[test]
    fn groups_arrive() {
        let two = decode(&bytes(&[24, GROUPS, 2, 7, 8, 0])).unwrap();
        assert_eq!(two.sup_gids, [7.into(), 8.into()]);
        assert!(decode(&[]).unwrap().sup_gids.is_empty());
    }

    #[test]
    fn broken_extensions_are_refused() {
        let broken: [&[u32]; 6] = [
            &[16, GROUPS, 2, 7],                   // a group is missing
            &[16, GROUPS, u32::MAX, 7],            // so are many
            &[24, GROUPS, 1, 7],                   // cut off
            &[4, GROUPS, 1, 7],                    // shorter than its header
            &[16, 1, 1, 7],                        // a security context: not negotiated
            &[16, GROUPS, 1, 7, 16, GROUPS, 1, 7], // twice
        ];
        for words in broken {
            assert!(decode(&bytes(words)).is_err(), "{words:?}");
        }
        assert!(decode(&[16, 0, 0]).is_err());
    }
}
