//! Every transport, placement and policy against real files.

use std::time::{Duration, Instant};
use tunnelfs_bench::plan::{pairs, Cpus, HostLocation, Load, Op, Pair, TransportKind};
use tunnelfs_bench::session::{Bench, Session};
use tunnelfs_bench::workload::{self, Sample};
use tunnelfs_fuse_abi::control::OP_NOOP;
use tunnelfs_guest::{fuse::message, transport::call};
use tunnelfs_ring::Policy;
use tunnelfs_settings::Settings;

/// How long what happens at once may take on a busy machine.
const PROMPT: Duration = Duration::from_secs(15);

/// A directory with the benchmark's file in it, gone with the first part.
fn bench() -> (tempfile::TempDir, Bench) {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("share");
    std::fs::create_dir(&dir).unwrap();
    workload::make_file(&dir).unwrap();
    let mut settings = Settings::default();
    settings.transport.queues = 2;
    let bench = Bench { dir, scratch: scratch.path().into(), settings };
    (scratch, bench)
}

fn separate(transport: TransportKind, policy: Policy) -> Pair {
    Pair { transport, placement: HostLocation::Separate, policy, cpus: Cpus::All }
}

#[test]
fn messages_of_every_size_arrive_intact() {
    let (_scratch, bench) = bench();
    for (i, pair) in pairs(false).iter().filter(|p| p.transport != TransportKind::Direct).enumerate() {
        let mut session = Session::open(&bench, pair, i).unwrap();
        for (op, size, depth, queues) in [
            (Op::Noop, 0, 1, 1),
            (Op::Getattr, 0, 4, 1),
            (Op::Lookup, 0, 4, 1),
            (Op::Write, 512, 1, 1),
            (Op::Read, 512, 1, 1),
            (Op::Write, 8192, 3, 1),
            (Op::Read, 4096, 8, 1),
            (Op::Write, 1 << 20, 2, 1),
            (Op::Read, 1 << 20, 8, 1),
            (Op::Read, 4096, 4, 2),
            (Op::Write, 4096, 4, 2),
        ] {
            // Stock virtiofsd has one.
            if queues as usize > session.queues.len() {
                continue;
            }
            let mut tally = Sample::default();
            let load = Load { op, size, depth, queues };
            workload::run(&mut session, load, Duration::from_millis(20), &mut tally)
                .unwrap_or_else(|e| panic!("{pair:?} {load:?}: {e}"));
            assert!(tally.ops > 0);
            match pair.transport {
                TransportKind::Socket => assert!(tally.copied >= tally.ops * u64::from(size), "{pair:?} {load:?}"),
                _ => assert_eq!(tally.copied, 0, "{pair:?} {load:?}"),
            }
        }
    }
    workload::check_file(&bench.dir).unwrap();
}

#[test]
fn the_host_is_another_process_and_its_death_is_an_error_at_once() {
    let (_scratch, bench) = bench();
    for (i, transport) in [TransportKind::Ring, TransportKind::Virtqueue, TransportKind::Socket].into_iter().enumerate()
    {
        let pair = separate(transport, Policy::Auto);
        let mut session = Session::open(&bench, &pair, i).unwrap();
        assert_ne!(session.host_pid().unwrap(), std::process::id());
        session.kill_host().unwrap();
        let start = Instant::now();
        let noop = message::request(OP_NOOP, 1, 9, &[], 0);
        let answer = call(session.queues[0].as_mut(), &noop, 0, 0);
        assert!(answer.is_err(), "{pair:?}");
        assert!(start.elapsed() < PROMPT, "{pair:?} took {:?}", start.elapsed());
    }
}

#[test]
fn a_ring_is_negotiated() {
    let (_scratch, bench) = bench();
    let pair = separate(TransportKind::Ring, Policy::Park);
    let session = Session::open(&bench, &pair, 0).unwrap();
    assert_eq!(session.queues[0].name(), "ring");
}

#[test]
fn more_than_the_ring_holds_is_pushed_back() {
    let (_scratch, bench) = bench();
    let pair = separate(TransportKind::Ring, Policy::Auto);
    let mut session = Session::open(&bench, &pair, 0).unwrap();
    let mut tally = Sample::default();
    let load = Load { op: Op::Noop, size: 0, depth: 1000, queues: 1 };
    workload::run(&mut session, load, Duration::from_millis(50), &mut tally).unwrap();
    assert!(tally.ops > 32);
}
