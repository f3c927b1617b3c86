//! The limit of every transport: the host's server called as a function.

use crate::plan::Load;
use crate::session::{open_file, thread_cpu, Bench, OpenFile};
use crate::workload::{check, fill, Tally, Template};
use std::io;
use std::time::{Duration, Instant};
use tunnelfs_host::server::{Outcome, Server};
use tunnelfs_host::share;
use tunnelfs_host::shared::Shared;
use tunnelfs_ring::Region;
use tunnelfs_settings::Host;
use virtiofsd::passthrough::PassthroughFs;

/// A server over the benchmark's directory, and one payload buffer.
pub struct Direct {
    server: Server<PassthroughFs>,
    buffer: Region,
    file: OpenFile,
}

impl Direct {
    /// Opens the benchmark's file.
    ///
    /// # Errors
    /// The file system's.
    pub fn open(bench: &Bench) -> io::Result<Self> {
        let host = Host { shared_dir: bench.dir.clone(), ..bench.settings.host.clone() };
        let server = Server::new(share::open(&host)?, host.allow_direct_io);
        let buffer = Region::new(1 << 20, false).map_err(io::Error::other)?;
        let mut direct = Direct { server, buffer, file: OpenFile { node: 1, handle: 0 } };
        direct.file = open_file(|head| direct.word(head))?;
        Ok(direct)
    }

    fn word(&self, head: &[u8]) -> io::Result<u64> {
        match self.call(head, 0, 4096) {
            Outcome::Reply(r) if r.error == 0 => {
                Ok(u64::from_ne_bytes(r.fixed()[..8].try_into().expect("eight bytes")))
            }
            Outcome::Reply(r) => Err(io::Error::from_raw_os_error(-r.error)),
            _ => Err(io::Error::other("no reply")),
        }
    }

    fn call(&self, head: &[u8], payload: u32, room: u32) -> Outcome {
        let part = |len: u32| [libc::iovec { iov_base: self.buffer.ptr().cast(), iov_len: len as usize }];
        let (input, output) = (part(payload), part(room));
        // SAFETY: both lie in this object's buffer.
        let (input, output) = unsafe { (Shared::new(&input), Shared::new(&output)) };
        self.server.handle(head, input, output, false)
    }

    /// As [`crate::workload::run`], one call at a time whatever the depth.
    ///
    /// # Errors
    /// The file system's, or wrong bytes.
    pub fn run(&mut self, load: Load, time: Duration, tally: &mut Tally) -> io::Result<()> {
        let mut template = Template::new(load, self.file);
        let (payload, room) = template.lengths();
        let (begin, cpu) = (Instant::now(), thread_cpu());
        while begin.elapsed() < time {
            let (head, offset) = template.advance();
            if payload > 0 {
                // SAFETY: the buffer is 1 MiB, as large as the largest load.
                unsafe { fill(self.buffer.ptr(), load.size, offset) };
            }
            let start = Instant::now();
            let outcome = self.call(head, payload, room);
            tally.latency.saturating_record(start.elapsed().as_nanos() as u64);
            match outcome {
                Outcome::Reply(reply) if reply.error == 0 && (payload > 0 || reply.in_place == load.size as usize) => {}
                _ => return Err(io::Error::other("the direct call failed")),
            }
            if load.op == crate::plan::Op::Read {
                // SAFETY: as above.
                unsafe { check(self.buffer.ptr(), load.size, offset)? };
            }
            tally.ops += 1;
        }
        tally.elapsed += begin.elapsed();
        tally.guest_cpu += thread_cpu() - cpu;
        Ok(())
    }
}
