//! Memory of the index, as the kernel counts it. A program of its own: nothing else may allocate meanwhile.

use understudy_disk::index::{Index, Piece, Source};

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// An index of 1 GiB of requests of so many sectors, scattered, none beside another.
fn gibibyte(sectors: u64) -> Index {
    let mut index = Index::default();
    let requests = (1 << 21) / sectors;
    for i in 0..requests {
        let sector = (i * 7919) % requests * sectors * 2;
        index.insert(Piece { sector, sectors, source: Source::Slice { serial: 1, data: i * (sectors * 512 + 64) } });
    }
    assert_eq!(index.len() as u64, requests);
    index
}

#[test]
fn the_index_of_a_gibibyte_takes_the_memory_that_it_says() {
    let before = resident();
    let index = gibibyte(8);
    let took = resident() - before;
    println!("1 GiB of scattered 4 KiB writes: {took} bytes, by its own account {}", index.bytes());
    assert!(took < index.bytes() * 3 / 2 && took > index.bytes() / 2, "{took} bytes, not about {}", index.bytes());
    drop(index);
    println!("1 GiB of scattered 1 MiB writes: {} bytes by its own account", gibibyte(2048).bytes());
}
