//! Every transport, placement and policy against real files.

use std::time::{Duration, Instant};
use tunnelfs_bench::plan::{pairs, Load, Op, Pair, Placement, Via};
use tunnelfs_bench::session::Session;
use tunnelfs_bench::workload::{self, Tally};
use tunnelfs_guest::{message, transport::call};
use tunnelfs_ring::{Policy, OP_NOOP};

fn share() -> (tempfile::TempDir, std::path::PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("share");
    std::fs::create_dir(&dir).unwrap();
    workload::make_file(&dir).unwrap();
    (scratch, dir)
}

#[test]
fn messages_of_every_size_arrive_intact() {
    let (scratch, dir) = share();
    for (i, pair) in pairs(false).iter().filter(|p| p.transport != Via::Direct).enumerate() {
        let mut session = Session::open(pair, &dir, scratch.path(), i).unwrap();
        for (op, size, depth) in [
            (Op::Noop, 0, 1),
            (Op::Getattr, 0, 4),
            (Op::Lookup, 0, 4),
            (Op::Write, 512, 1),
            (Op::Read, 512, 1),
            (Op::Write, 8192, 3),
            (Op::Read, 4096, 8),
            (Op::Write, 1 << 20, 2),
            (Op::Read, 1 << 20, 8),
        ] {
            let mut tally = Tally::default();
            let load = Load { op, size, depth, queues: 1 };
            workload::run(&mut session, load, Duration::from_millis(20), &mut tally)
                .unwrap_or_else(|e| panic!("{pair:?} {load:?}: {e}"));
            assert!(tally.ops > 0);
            match pair.transport {
                Via::Socket => assert!(tally.copied >= tally.ops * u64::from(size), "{pair:?} {load:?}"),
                _ => assert_eq!(tally.copied, 0, "{pair:?} {load:?}"),
            }
        }
    }
    workload::check_file(&dir).unwrap();
}

#[test]
fn the_host_is_another_process_and_its_death_is_an_error_at_once() {
    let (scratch, dir) = share();
    for (i, transport) in [Via::Ring, Via::Virtqueue, Via::Socket].into_iter().enumerate() {
        let pair = Pair { transport, placement: Placement::Separate, policy: Policy::Auto };
        let mut session = Session::open(&pair, &dir, scratch.path(), i).unwrap();
        assert_ne!(session.host_pid().unwrap(), std::process::id());
        session.kill_host().unwrap();
        let start = Instant::now();
        let noop = message::request(OP_NOOP, 1, 9, &[], 0);
        let answer = call(session.queues[0].as_mut(), &noop, 0, 0);
        assert!(answer.is_err(), "{pair:?}");
        assert!(start.elapsed() < Duration::from_secs(1), "{pair:?} took {:?}", start.elapsed());
    }
}

#[test]
fn a_ring_is_negotiated() {
    let (scratch, dir) = share();
    let pair = Pair { transport: Via::Ring, placement: Placement::Separate, policy: Policy::Park };
    let session = Session::open(&pair, &dir, scratch.path(), 0).unwrap();
    assert_eq!(session.queues[0].name(), "ring");
}

#[test]
fn more_than_the_ring_holds_is_pushed_back() {
    let (scratch, dir) = share();
    let pair = Pair { transport: Via::Ring, placement: Placement::Separate, policy: Policy::Auto };
    let mut session = Session::open(&pair, &dir, scratch.path(), 0).unwrap();
    let mut tally = Tally::default();
    let load = Load { op: Op::Noop, size: 0, depth: 1000, queues: 1 };
    workload::run(&mut session, load, Duration::from_millis(50), &mut tally).unwrap();
    assert!(tally.ops > 32);
}
