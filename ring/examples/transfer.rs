//! Two processes: a server reads a file for its client, 1 MiB at a time, which checks the bytes. The same over the ring,
//! a pipe, a UNIX socket and ipc-channel's shared memory, in turns, in one run.
//!
//! `cargo run --release --example transfer [MIB]`

use ipc_channel::ipc::{self, IpcOneShotServer, IpcReceiver, IpcSender, IpcSharedMemory};
use nix::unistd::pipe;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tunnelfs_ring::{Device, Driver, Error, Geometry, Handoff, WaitConfig};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Moves that many pieces of a file, whose path is given.
type Way = fn(&str, usize) -> Result<()>;

const PIECE: usize = 1 << 20;
/// Pieces on their way at a time. A pipe and a socket have the kernel's buffer instead.
const DEPTH: u32 = 8;
const ROUNDS: usize = 3;
const TIMEOUT: Option<Duration> = Some(Duration::from_secs(20));

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", way, path, name] => serve(way, &File::open(path)?, name),
        [] => compare(512),
        [mib] => compare(mib.parse()?),
        _ => Err("usage: transfer [MIB]".into()),
    }
}

/// Each way has its turn in each round; the best round counts, since anything else that runs only makes one slower.
fn compare(mib: usize) -> Result<()> {
    let path = std::env::temp_dir().join(format!("tunnelfs-transfer-{}", std::process::id()));
    let mut file = File::create(&path)?;
    (0..mib).try_for_each(|n| file.write_all(&vec![n as u8; PIECE]))?;
    let ways: [(&str, Way); 4] =
        [("ring", over_ring), ("pipe", over_pipe), ("UNIX socket", over_socket), ("ipc-channel", over_ipc_channel)];
    let mut best = [Duration::MAX; 4];
    let mut result = Ok(());
    for _ in 0..ROUNDS {
        for ((_, run), best) in ways.iter().zip(&mut best) {
            let start = Instant::now();
            result = result.and_then(|()| run(&path.to_string_lossy(), mib));
            *best = start.elapsed().min(*best);
        }
    }
    std::fs::remove_file(&path)?;
    result?;
    for ((name, _), time) in ways.iter().zip(best) {
        println!("{name:12} {:6.2} GB/s", (mib * PIECE) as f64 / time.as_secs_f64() / 1e9);
    }
    Ok(())
}

/// This program as the server, with `stdin` and `stdout` for what it serves over.
fn start(way: &str, path: &str, name: &str, stdin: Stdio, stdout: Stdio) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    Ok(command.args(["serve", way, path, name]).stdin(stdin).stdout(stdout).spawn()?)
}

fn serve(way: &str, file: &File, name: &str) -> Result<()> {
    let stdin = || std::io::stdin().as_fd().try_clone_to_owned();
    match way {
        "ring" => serve_ring(file, &UnixStream::from(stdin()?)),
        "pipe" => serve_stream(file, std::io::stdout().as_fd().try_clone_to_owned()?.into()),
        "socket" => serve_stream(file, File::from(stdin()?)),
        _ => serve_ipc_channel(file, name),
    }
}

/// All bytes of piece `n` are its number.
fn check(n: usize, bytes: &[u8]) -> Result<()> {
    let right = bytes.len() == PIECE && bytes.iter().all(|&b| b == n as u8);
    right.then_some(()).ok_or_else(|| format!("piece {n} has wrong bytes").into())
}

fn over_ring(path: &str, count: usize) -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut child = start("ring", path, "", OwnedFd::from(theirs).into(), Stdio::null())?;
    let geometry = Geometry { entries: DEPTH, slots: DEPTH, slot_size: PIECE as u32 };
    let (mut driver, handoff) = Driver::create(geometry, WaitConfig::default())?;
    handoff.send(&ours)?;
    let (mut asked, mut got, mut bytes) = (0u64, 0, vec![0; PIECE]);
    while got < count {
        while asked < count as u64 {
            let Some(slot) = driver.alloc() else { break };
            driver.submit(&asked.to_le_bytes(), slot, 0, PIECE as u32)?;
            asked += 1;
        }
        let reply = driver.reap_within(TIMEOUT)?;
        let n = u64::from_le_bytes(reply.msg().try_into()?) as usize;
        let mut slot = reply.slot;
        // The server could still write into the buffer: what is checked is a copy.
        driver.payload(&mut slot).read_at(0, &mut bytes)?;
        check(n, &bytes)?;
        driver.free(slot);
        got += 1;
    }
    drop(driver);
    ended(&mut child)
}

/// The kernel reads the file into the client's buffers.
fn serve_ring(file: &File, socket: &UnixStream) -> Result<()> {
    let mut device = Device::attach(Handoff::recv(socket)?, WaitConfig::default())?;
    loop {
        let mut request = match device.next_within(None) {
            Err(Error::PeerGone) => return Ok(()),
            request => request?,
        };
        let msg: [u8; 8] = request.msg().try_into()?;
        let room = request.reply_max();
        let offset = u64::from_le_bytes(msg) * PIECE as u64;
        let len = device.payload(&mut request).read_from(file, room, offset)?;
        device.complete(request, &msg, len as u32)?;
    }
}

fn over_pipe(path: &str, count: usize) -> Result<()> {
    let (reader, writer) = pipe()?;
    let mut child = start("pipe", path, "", Stdio::null(), writer.into())?;
    take_stream(File::from(reader), count)?;
    ended(&mut child)
}

fn over_socket(path: &str, count: usize) -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut child = start("socket", path, "", OwnedFd::from(theirs).into(), Stdio::null())?;
    take_stream(ours, count)?;
    ended(&mut child)
}

fn take_stream(mut stream: impl Read, count: usize) -> Result<()> {
    let mut bytes = vec![0; PIECE];
    for n in 0..count {
        stream.read_exact(&mut bytes)?;
        check(n, &bytes)?;
    }
    Ok(())
}

fn serve_stream(mut file: &File, mut stream: File) -> Result<()> {
    let mut bytes = vec![0; PIECE];
    while file.read(&mut bytes)? == PIECE {
        stream.write_all(&bytes)?;
    }
    Ok(())
}

fn over_ipc_channel(path: &str, count: usize) -> Result<()> {
    let (server, name) = IpcOneShotServer::<(IpcReceiver<IpcSharedMemory>, IpcSender<()>)>::new()?;
    let mut child = start("ipc-channel", path, &name, Stdio::null(), Stdio::null())?;
    let (_, (pieces, more)) = server.accept()?;
    (0..DEPTH).try_for_each(|_| more.send(()))?;
    for n in 0..count {
        check(n, &pieces.recv()?)?;
        let _ = more.send(());
    }
    ended(&mut child)
}

/// A new piece of shared memory for each message: that is how ipc-channel sends large ones.
fn serve_ipc_channel(file: &File, name: &str) -> Result<()> {
    let (pieces, theirs) = ipc::channel()?;
    let (more, credits) = ipc::channel::<()>()?;
    IpcSender::connect(name.into())?.send((theirs, more))?;
    let mut bytes = vec![0; PIECE];
    for offset in (0..file.metadata()?.len()).step_by(PIECE) {
        credits.recv()?;
        file.read_exact_at(&mut bytes, offset)?;
        pieces.send(IpcSharedMemory::from_bytes(&bytes))?;
    }
    Ok(())
}

fn ended(child: &mut Child) -> Result<()> {
    child.wait()?.success().then_some(()).ok_or_else(|| "the server failed".into())
}
