//! What the kernel may append to requests that create something
//! (`struct fuse_ext_header` of linux/fuse.h).

use crate::fs::Extensions;
use crate::guest_buf::einval;
use crate::request::parse_cstr;
use std::ffi::CString;
use std::io;
use tunnelfs_fuse_abi::flags::{EXT_GROUPS, MAX_NR_SECCTX};

/// Bytes of `struct fuse_ext_header`, of `struct fuse_secctx_header` and of `struct fuse_secctx`.
const HEADER: usize = 8;

/// Decodes the extensions behind a request's names.
///
/// # Errors
/// `EINVAL` when they are cut off, of an unknown kind or there twice.
pub fn decode(mut bytes: &[u8]) -> io::Result<Extensions> {
    let (mut groups, mut labels) = (None, None);
    while !bytes.is_empty() {
        let size = word(bytes, 0)? as usize;
        let body = bytes.get(HEADER..size).ok_or_else(einval)?;
        let twice = match word(bytes, 4)? {
            EXT_GROUPS => groups.replace(decode_groups(body)?).is_some(),
            count if count <= MAX_NR_SECCTX => labels.replace(decode_labels(body, count)?).is_some(),
            _ => true,
        };
        if twice {
            return Err(einval());
        }
        bytes = &bytes[size..];
    }
    Ok(Extensions { groups: groups.unwrap_or_default(), labels: labels.unwrap_or_default() })
}

/// `struct fuse_supp_groups`: a count, then the groups.
fn decode_groups(body: &[u8]) -> io::Result<Vec<u32>> {
    (1..=word(body, 0)? as usize).map(|i| word(body, 4 * i)).collect()
}

/// Each a `struct fuse_secctx`, a name with its NUL, and a value.
fn decode_labels(mut body: &[u8], count: u32) -> io::Result<Vec<(CString, Vec<u8>)>> {
    let mut labels = Vec::new();
    for _ in 0..count {
        let size = word(body, 0)? as usize;
        let mut rest = body.get(HEADER..).ok_or_else(einval)?;
        let name = parse_cstr(&mut rest)?.to_owned();
        let value = rest.get(..size).ok_or_else(einval)?;
        labels.push((name, value.to_vec()));
        body = &rest[size..];
    }
    Ok(labels)
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
        let two = decode(&bytes(&[24, EXT_GROUPS, 2, 7, 8, 0])).unwrap();
        assert_eq!(two.groups, [7, 8]);
        assert!(decode(&[]).unwrap().groups.is_empty());
    }

    #[test]
    fn labels_arrive() {
        let mut request = bytes(&[32, 1, 5, 0]);
        request.extend(b"a.b\0label\0\0\0\0\0\0\0");
        let label = decode(&request).unwrap();
        assert_eq!(label.labels, [(c"a.b".to_owned(), b"label".to_vec())]);
        request[8] = 200;
        assert!(decode(&request).is_err());
    }

    #[test]
    fn broken_extensions_are_refused() {
        let broken: [&[u32]; 7] = [
            &[16, EXT_GROUPS, 2, 7],                       // a group is missing
            &[16, EXT_GROUPS, u32::MAX, 7],                // so are many
            &[24, EXT_GROUPS, 1, 7],                       // cut off
            &[4, EXT_GROUPS, 1, 7],                        // shorter than its header
            &[16, 1, 1, 7],                                // a security context without a name
            &[16, 40, 1, 7],                               // nothing that is known
            &[16, EXT_GROUPS, 1, 7, 16, EXT_GROUPS, 1, 7], // twice
        ];
        for words in broken {
            assert!(decode(&bytes(words)).is_err(), "{words:?}");
        }
        assert!(decode(&[16, 0, 0]).is_err());
    }
}
