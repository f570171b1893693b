//! Frames: what a guest sends and what arrives for it, as far as they are read on the way.

use std::time::Duration;

use understudy_protocol::nic_filter::FilterSpec;
use understudy_vmm::devices::{Snapshot, VmTime};
use understudy_vmm::net::addresses::Addresses;
use understudy_vmm::net::announce::Announcer;
use understudy_vmm::net::filter::Filter;
use understudy_vmm::net::frame::look;
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
