//! Frames: what a guest sends and what arrives for it, as far as they are read on the way.

use std::time::Duration;

use understudy_protocol::nic_filter::FilterSpec;
use understudy_vmm::devices::virtio::net::FRAME;
use understudy_vmm::devices::{Snapshot, VmTime};
use understudy_vmm::net::addresses::Addresses;
use understudy_vmm::net::announce::Announcer;
use understudy_vmm::net::filter::Filter;
use understudy_vmm::net::frame::look;
use understudy_vmm::net::framed::{Framed, prefix};
use understudy_vmm::net::packet::{HEADER, Packet};

use crate::input::Input;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const WORDS: [&[(&str, &str)]; 4] = [
    &[],
    &[("spoof", "deny"), ("addresses", "10.0.0.1+fd00::1")],
    &[("vlan", "12"), ("storm", "3")],
    &[("rate-out", "131072"), ("rate-in", "131072"), ("burst", "1514")],
];

/// Frames both ways through a filter, the addresses that are learnt from them, a takeover now and then: what was learnt can be restored, and what is announced
/// says only what was learnt.
pub fn frames(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut spec = FilterSpec::default();
    for (key, value) in WORDS[usize::from(input.byte()) % WORDS.len()] {
        assert_eq!(spec.word(key, value), Some(Ok(false)), "{key}={value}");
    }
    let (mut filter, mut addresses, mut now) = (Filter::new(&spec, MAC), Addresses::default(), 0u64);
    while !input.is_empty() {
        let what = input.byte();
        now += u64::from(what >> 2) * 50_000_000;
        let (at, vm_time) = (Duration::from_nanos(now), VmTime(now));
        let frame = input.piece();
        match what & 3 {
            0 | 1 => {
                if filter.outbound(frame, at).is_ok() {
                    addresses.sent(frame, vm_time);
                    let mut packet = Packet { header: [1; HEADER], frame: frame.to_vec(), queue: 0 };
                    filter.tag(&mut packet);
                }
            }
            2 => {
                let mut packet = [&[1; HEADER], frame].concat();
                if filter.inbound(&mut packet, at).is_ok() {
                    addresses.heard(&packet[HEADER..]);
                }
            }
            _ => {
                let mut restored = Addresses::default();
                restored.restore(addresses.save()).expect("what was learnt can be restored");
                assert_eq!(restored.save(), addresses.save());
                let known: Vec<_> = restored.to_announce(vm_time).map(|entry| entry.mac).collect();
                for frame in Announcer::new(&restored, MAC, vm_time).due(Duration::ZERO) {
                    let seen = look(frame).expect("what is announced is a frame");
                    assert!(seen.source == MAC || known.contains(&seen.source));
                }
                addresses = restored;
            }
        }
    }
}

/// A switch at the other end of a stream socket that says anything: frames, and bytes that are none. What comes out is what was said, byte for byte, up to
/// the first length that no frame has; after that nothing comes.
pub fn stream(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (mut framed, mut said, mut heard) = (Framed::default(), Vec::new(), Vec::new());
    while !input.is_empty() {
        let how = input.byte();
        let mut piece = input.piece().to_vec();
        if how & 1 == 0 {
            piece.splice(..0, prefix(&piece));
        }
        // Also cut in two, at any place.
        let (first, second) = piece.split_at(usize::from(how >> 1) % (piece.len() + 1));
        for part in [first, second] {
            framed.push(part);
            said.extend_from_slice(part);
            loop {
                match framed.pull() {
                    Ok(Some(frame)) => {
                        assert!(frame.len() <= FRAME);
                        heard.extend(prefix(frame));
                        heard.extend(frame);
                    }
                    Ok(None) => break,
                    Err(_) => {
                        assert!(framed.pull().is_err(), "what is no frame does not become one");
                        assert!(said.starts_with(&heard));
                        return;
                    }
                }
            }
            assert!(said.starts_with(&heard) && said.len() == heard.len() + framed.kept());
            assert!(framed.kept() < FRAME + 4);
        }
    }
}
