//! Which frames the guest wants: its address, its tables of addresses and VLANs (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3). Pure; the tables are bounded, and one that does
//! not fit lets everything of its kind through, as a card's own does.

use serde::{Deserialize, Serialize};
use understudy_protocol::nic::Mac;

/// Most addresses in one of the two tables.
pub const TABLE: usize = 64;
const VLANS: usize = 4096;
const WORDS: usize = VLANS / 64;

/// One table of addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Those that fitted.
    pub addresses: Vec<Mac>,
    /// There were more: any passes.
    pub overflow: bool,
}

impl Table {
    /// Of these addresses.
    pub fn of(addresses: impl ExactSizeIterator<Item = Mac>) -> Self {
        if addresses.len() > TABLE {
            return Self { addresses: Vec::new(), overflow: true };
        }
        Self { addresses: addresses.collect(), overflow: false }
    }

    fn has(&self, mac: Mac) -> bool {
        self.overflow || self.addresses.contains(&mac)
    }
}

/// What the driver has switched on (5.1.6.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "six independent switches of the device")]
pub struct Modes {
    /// Everything.
    pub promisc: bool,
    /// Every group's frames.
    pub allmulti: bool,
    /// Every card's.
    pub alluni: bool,
    /// No group's but broadcast.
    pub nomulti: bool,
    /// No card's.
    pub nouni: bool,
    /// No broadcast.
    pub nobcast: bool,
}

impl Default for Modes {
    /// Everything, until the driver says what it wants.
    fn default() -> Self {
        Self { promisc: true, allmulti: false, alluni: false, nomulti: false, nouni: false, nobcast: false }
    }
}

/// All filters of a card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filters {
    /// The card's own address.
    pub mac: Mac,
    /// Switches.
    pub modes: Modes,
    /// Other addresses of its own.
    pub unicast: Table,
    /// Groups.
    pub multicast: Table,
    vlans: [u64; WORDS],
}

impl Filters {
    /// After a reset.
    pub fn new(mac: Mac) -> Self {
        Self { mac, modes: Modes::default(), unicast: Table::default(), multicast: Table::default(), vlans: [0; WORDS] }
    }

    /// Frames of this VLAN pass or not. False: there is no such VLAN.
    pub fn set_vlan(&mut self, vlan: u16, passes: bool) -> bool {
        let Some(word) = self.vlans.get_mut(usize::from(vlan) / 64) else { return false };
        let bit = 1 << (vlan % 64);
        *word = if passes { *word | bit } else { *word & !bit };
        true
    }

    /// Words of the table of VLANs, for a saved state.
    pub fn vlans(&self) -> &[u64] {
        &self.vlans
    }

    /// Back from one. `None`: it is none.
    pub fn restored(mac: Mac, modes: Modes, unicast: Table, multicast: Table, vlans: &[u64]) -> Option<Self> {
        let fits = |table: &Table| table.addresses.len() <= TABLE;
        let vlans = vlans.try_into().ok()?;
        (fits(&unicast) && fits(&multicast)).then_some(Self { mac, modes, unicast, multicast, vlans })
    }

    /// Whether the guest wants this frame. `addresses`, `vlans`: the driver agreed to say so of the one and the other.
    pub fn want(&self, frame: &[u8], addresses: bool, vlans: bool) -> bool {
        let Some(Ok(to)) = frame.get(..6).map(<[u8; 6]>::try_from) else { return false };
        if addresses && self.modes.promisc {
            return true;
        }
        if vlans && let Some([0x81, 0x00, high, low]) = frame.get(12..16) {
            let vlan = usize::from(u16::from_be_bytes([high & 0x0f, *low]));
            // VLAN 0 is none: only the priority counts (IEEE 802.1Q).
            if vlan != 0 && self.vlans[vlan / 64] & 1 << (vlan % 64) == 0 {
                return false;
            }
        }
        let (to, modes) = (Mac(to), self.modes);
        if !addresses {
            return true;
        }
        if to.0 == [0xff; 6] {
            !modes.nobcast
        } else if to.is_group() {
            !modes.nomulti && (modes.allmulti || self.multicast.has(to))
        } else {
            !modes.nouni && (modes.alluni || to == self.mac || self.unicast.has(to))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);

    fn to(mac: [u8; 6]) -> Vec<u8> {
        [&mac[..], &[2, 0, 0, 0, 0, 9, 8, 0]].concat()
    }

    #[test]
    fn a_driver_that_has_said_nothing_gets_everything() {
        let f = Filters::new(OWN);
        for addresses in [false, true] {
            assert!(f.want(&to([2, 0, 0, 0, 0, 7]), addresses, false));
        }
        assert!(!f.want(&[0; 5], true, true), "but no stub of a frame");
    }

    #[test]
    fn the_guest_gets_what_it_asked_for() {
        let mut f = Filters::new(OWN);
        f.modes.promisc = false;
        f.unicast = Table::of([Mac([2, 0, 0, 0, 0, 2])].into_iter());
        f.multicast = Table::of([Mac([1, 0, 0x5e, 0, 0, 1])].into_iter());
        let got = |f: &Filters, mac| f.want(&to(mac), true, false);
        assert!(got(&f, OWN.0) && got(&f, [2, 0, 0, 0, 0, 2]) && !got(&f, [2, 0, 0, 0, 0, 3]));
        assert!(got(&f, [1, 0, 0x5e, 0, 0, 1]) && !got(&f, [1, 0, 0x5e, 0, 0, 2]) && got(&f, [0xff; 6]));
        f.modes.alluni = true;
        f.modes.allmulti = true;
        assert!(got(&f, [2, 0, 0, 0, 0, 3]) && got(&f, [1, 0, 0x5e, 0, 0, 2]));
        f.modes = Modes { promisc: false, nouni: true, nomulti: true, nobcast: true, ..f.modes };
        assert!(!got(&f, OWN.0) && !got(&f, [1, 0, 0x5e, 0, 0, 1]) && !got(&f, [0xff; 6]));
    }

    #[test]
    fn a_table_that_does_not_fit_lets_its_kind_through() {
        let mut f = Filters::new(OWN);
        f.modes.promisc = false;
        f.unicast = Table::of((0..65u8).map(|i| Mac([2, 1, 0, 0, 0, i])).collect::<Vec<_>>().into_iter());
        assert!(f.want(&to([2, 9, 9, 9, 9, 9]), true, false));
        assert!(!f.want(&to([1, 9, 9, 9, 9, 9]), true, false));
    }

    #[test]
    fn vlans_pass_that_were_added_and_the_one_that_is_none() {
        let mut f = Filters::new(OWN);
        f.modes.promisc = false;
        let tagged = |vlan: u16| [&OWN.0[..], &[2; 6], &[0x81, 0], &(0xe000 | vlan).to_be_bytes(), &[8, 0]].concat();
        assert!(f.want(&tagged(0), true, true) && !f.want(&tagged(5), true, true) && f.want(&tagged(5), true, false));
        assert!(f.set_vlan(5, true) && f.want(&tagged(5), true, true));
        assert!(f.set_vlan(5, false) && !f.want(&tagged(5), true, true));
        assert!(f.set_vlan(4095, true) && !f.set_vlan(4096, true));
    }
}
