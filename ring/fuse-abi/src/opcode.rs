//! `enum fuse_opcode`: the operations, and their numbers as a header has them.

macro_rules! opcodes {
    ($($name:ident = $number:literal, $text:ident;)*) => {
        /// An operation (`enum fuse_opcode`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Opcode {
            $(#[doc = concat!("`FUSE_", stringify!($text), "`.")] $name = $number,)*
        }

        impl Opcode {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Opcode] = &[$(Opcode::$name,)*];

            /// The operation with this number; `None` for one that 7.45 does not have.
            pub const fn new(number: u32) -> Option<Opcode> {
                match number {
                    $($number => Some(Opcode::$name),)*
                    _ => None,
                }
            }

            /// Returns the name, without `FUSE_`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Opcode::$name => stringify!($text),)*
                }
            }
        }

        $(#[doc = concat!("`FUSE_", stringify!($text), "`.")] pub const $text: u32 = $number;)*
    };
}

/// The name of the operation with this number, for people.
pub fn name(number: u32) -> &'static str {
    Opcode::new(number).map_or("?", Opcode::name)
}

opcodes! {
    Lookup = 1, LOOKUP;
    Forget = 2, FORGET;
    Getattr = 3, GETATTR;
    Setattr = 4, SETATTR;
    Readlink = 5, READLINK;
    Symlink = 6, SYMLINK;
    Mknod = 8, MKNOD;
    Mkdir = 9, MKDIR;
    Unlink = 10, UNLINK;
    Rmdir = 11, RMDIR;
    Rename = 12, RENAME;
    Link = 13, LINK;
    Open = 14, OPEN;
    Read = 15, READ;
    Write = 16, WRITE;
    Statfs = 17, STATFS;
    Release = 18, RELEASE;
    Fsync = 20, FSYNC;
    Setxattr = 21, SETXATTR;
    Getxattr = 22, GETXATTR;
    Listxattr = 23, LISTXATTR;
    Removexattr = 24, REMOVEXATTR;
    Flush = 25, FLUSH;
    Init = 26, INIT;
    Opendir = 27, OPENDIR;
    Readdir = 28, READDIR;
    Releasedir = 29, RELEASEDIR;
    Fsyncdir = 30, FSYNCDIR;
    Getlk = 31, GETLK;
    Setlk = 32, SETLK;
    Setlkw = 33, SETLKW;
    Access = 34, ACCESS;
    Create = 35, CREATE;
    Interrupt = 36, INTERRUPT;
    Bmap = 37, BMAP;
    Destroy = 38, DESTROY;
    Ioctl = 39, IOCTL;
    Poll = 40, POLL;
    NotifyReply = 41, NOTIFY_REPLY;
    BatchForget = 42, BATCH_FORGET;
    Fallocate = 43, FALLOCATE;
    Readdirplus = 44, READDIRPLUS;
    Rename2 = 45, RENAME2;
    Lseek = 46, LSEEK;
    CopyFileRange = 47, COPY_FILE_RANGE;
    SetupMapping = 48, SETUPMAPPING;
    RemoveMapping = 49, REMOVEMAPPING;
    Syncfs = 50, SYNCFS;
    Tmpfile = 51, TMPFILE;
    Statx = 52, STATX;
    CopyFileRange64 = 53, COPY_FILE_RANGE_64;
}

#[cfg(test)]
mod tests {
    use super::Opcode;

    #[test]
    fn numbers_and_operations_are_one_to_one() {
        for &opcode in Opcode::ALL {
            assert_eq!(Opcode::new(opcode as u32), Some(opcode), "{}", opcode.name());
        }
        for number in [0, 7, 19, 54, 4096, u32::MAX] {
            assert_eq!(Opcode::new(number), None);
        }
    }
}
