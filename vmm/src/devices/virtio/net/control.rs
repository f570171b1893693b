//! The control queue (virtio 1.2, 5.1.6.5): class, command and data in, one byte of acknowledgement out.

use understudy_protocol::nic::Mac;
use virtio_bindings::virtio_net as spec;

use super::super::super::GuestRam;
use super::super::{Broken, CHAINS_PER_CALL, Chain, Progress, VirtQueue};
use super::Net;
use super::filters::Table;

/// Most bytes of a command's data: two tables of some hundred addresses.
const DATA: usize = 8192;
const OK: u8 = spec::VIRTIO_NET_OK as u8;
const ERR: u8 = spec::VIRTIO_NET_ERR as u8;

impl Net {
    /// Do what the driver asks.
    pub(super) fn control(&mut self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        for _ in 0..CHAINS_PER_CALL / 4 {
            let Some(chain) = queue.next_chain(ram)? else { return Ok(Progress::Idle) };
            if chain.writable_len() == 0 {
                return Err(Broken("a command without room for its acknowledgement"));
            }
            let ack = if self.command(&chain, ram)?.is_some() { OK } else { ERR };
            chain.write(ram, &[ack])?;
            queue.complete(ram, &chain, 1)?;
        }
        Ok(Progress::More)
    }

    /// `None`: it is refused.
    fn command(&mut self, chain: &Chain, ram: &GuestRam) -> Result<Option<()>, Broken> {
        let len = chain.readable_len();
        if !(2..=2 + DATA).contains(&len) {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(len);
        chain.read(ram, 0, len, &mut bytes)?;
        let [class, command, data @ ..] = &bytes[..] else { return Ok(None) };
        Ok(self.act(u32::from(*class), u32::from(*command), data))
    }

    fn act(&mut self, class: u32, command: u32, data: &[u8]) -> Option<()> {
        let one = || if let [value] = data { Some(*value != 0) } else { None };
        let short = || <[u8; 2]>::try_from(data).ok().map(u16::from_le_bytes);
        match class {
            spec::VIRTIO_NET_CTRL_RX => {
                let extra = self.agreed_on(spec::VIRTIO_NET_F_CTRL_RX_EXTRA);
                let modes = &mut self.filters.modes;
                let switch = match command {
                    spec::VIRTIO_NET_CTRL_RX_PROMISC => &mut modes.promisc,
                    spec::VIRTIO_NET_CTRL_RX_ALLMULTI => &mut modes.allmulti,
                    spec::VIRTIO_NET_CTRL_RX_ALLUNI if extra => &mut modes.alluni,
                    spec::VIRTIO_NET_CTRL_RX_NOMULTI if extra => &mut modes.nomulti,
                    spec::VIRTIO_NET_CTRL_RX_NOUNI if extra => &mut modes.nouni,
                    spec::VIRTIO_NET_CTRL_RX_NOBCAST if extra => &mut modes.nobcast,
                    _ => return None,
                };
                *switch = one()?;
            }
            spec::VIRTIO_NET_CTRL_MAC => match command {
                spec::VIRTIO_NET_CTRL_MAC_TABLE_SET => {
                    let (unicast, rest) = table(data)?;
                    let (multicast, rest) = table(rest)?;
                    if !rest.is_empty() {
                        return None;
                    }
                    (self.filters.unicast, self.filters.multicast) = (unicast, multicast);
                }
                spec::VIRTIO_NET_CTRL_MAC_ADDR_SET => {
                    let mac = Mac(data.try_into().ok()?);
                    if mac.is_group() {
                        return None;
                    }
                    self.filters.mac = mac;
                }
                _ => return None,
            },
            spec::VIRTIO_NET_CTRL_VLAN => {
                let passes = match command {
                    spec::VIRTIO_NET_CTRL_VLAN_ADD => true,
                    spec::VIRTIO_NET_CTRL_VLAN_DEL => false,
                    _ => return None,
                };
                return self.filters.set_vlan(short()?, passes).then_some(());
            }
            spec::VIRTIO_NET_CTRL_ANNOUNCE => {
                if command != spec::VIRTIO_NET_CTRL_ANNOUNCE_ACK || !data.is_empty() || !self.announce {
                    return None;
                }
                self.announce = false;
            }
            spec::VIRTIO_NET_CTRL_MQ => {
                let pairs = short().filter(|pairs| (1..=self.config.pairs).contains(pairs))?;
                if command != spec::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET || !self.agreed_on(spec::VIRTIO_NET_F_MQ) {
                    return None;
                }
                self.pairs = pairs;
            }
            spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS => {
                let offloads = u64::from_le_bytes(data.try_into().ok()?);
                if command != spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
                    || !self.agreed_on(spec::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
                    || offloads & !(self.features & super::GUEST_OFFLOADS) != 0
                {
                    return None;
                }
                self.guest_offloads = Some(offloads);
            }
            _ => return None,
        }
        Some(())
    }
}

/// A table of addresses with their number in front, and what follows it.
fn table(data: &[u8]) -> Option<(Table, &[u8])> {
    let (number, rest) = data.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*number)).ok()?.checked_mul(6)?;
    let (addresses, rest) = rest.split_at_checked(len)?;
    Some((Table::of(addresses.as_chunks::<6>().0.iter().map(|mac| Mac(*mac))), rest))
}
