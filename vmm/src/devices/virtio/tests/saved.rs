//! The three kinds of saved state: transport, entropy device, console.

use super::super::VirtioPci;
use super::*;
use crate::devices::testing::snapshot_tests;

mod transport_state {
    use super::*;
    use crate::devices::pci::PciFunction;

    fn fresh() -> VirtioPci<Console> {
        VirtioPci::new(Console::new())
    }

    fn used() -> VirtioPci<Console> {
        let mut guest = console();
        guest.send(TX, 0x5000, b"x");
        guest.kick(TX); // INTx: leaves the ISR set
        guest.enable_msix();
        guest.write(0x4000 + 16 * 2 + 12, &[1, 0, 0, 0]);
        guest.send(TX, 0x5000, b"x");
        guest.kick(TX); // masked: leaves a pending bit
        guest.add(RX, &[(0x6000, 4, true)]);
        guest.with(|d, ctx| d.receive(b"in", ctx)); // leaves a message
        guest.write(0x08, &[0, 0, 0, 0]);
        guest.write(0x00, &[1, 0, 0, 0]);
        let saved = guest.device().save();
        let mut device = fresh();
        device.restore(saved).unwrap();
        device
    }

    snapshot_tests! {
        fresh: fresh(),
        used: used(),
        exercise: |device| {
            let guest = Guest::new(Rng::new());
            let ctx = Ctx { now: VmTime(0), ram: &guest.ram };
            device.process(&guest.ram);
            device.set_output_room(100, &ctx);
            device.bar_read(0, 0, &mut [0; 64], &ctx);
            device.config_read(0, &mut [0; 4], &ctx);
            device.take_msi(&mut Vec::new());
        },
        golden: "8002f41a4310070018000100800700000000000000c0000000000000000000000000000000000000000000000000f41a001100000000400000000000000000010000114c02800040000000500000095c1001000000000000000000100000096c1003000000000010000000100000097c100400000000002000000010000009901402000000000030000000100000040000000900140500000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000003808080f70f4000808080f70f4100808080f70f42010001808080f70f410208808004808005808006010101010880800880800980800a02010202010080808080120f010001",
    }
}

mod rng_state {
    use super::*;

    fn used() -> Rng {
        let mut guest = Guest::ready(Rng::new(), VERSION_1);
        guest.add(0, &[(0x5000, 300, true)]);
        guest.kick(0);
        let mut rng = Rng::new();
        rng.restore(guest.device().device().save()).unwrap();
        rng
    }

    snapshot_tests! {
        fresh: Rng::new(),
        used: used(),
        exercise: |rng| _ = rng.save(),
        golden: "ac02",
    }
}

mod console_state {
    use super::*;

    fn used() -> Console {
        let mut guest = console();
        guest.with(|d, ctx| d.set_output_room(300, ctx));
        guest.with(|d, ctx| d.receive(b"input", ctx));
        guest.add(TX, &[(0x5000, 1000, false)]);
        guest.kick(TX);
        guest.device().take_output();
        guest.with(|d, ctx| d.set_output_room(3, ctx));
        let mut console = Console::new();
        console.restore(guest.device().device().save()).unwrap();
        console
    }

    snapshot_tests! {
        fresh: Console::new(),
        used: used(),
        exercise: |console| _ = console.save(),
        golden: "0300000005696e707574af02",
    }
}
