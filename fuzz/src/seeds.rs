//! First inputs, made by our own encoders: `UNDERSTUDY_FUZZ_SEEDS=1 cargo test -p understudy-fuzz` writes them to the corpus.
//! They are kept as files so that an input means the same when an encoder changes.

use understudy_alerts::alarm::{Alarm, Severity};
use understudy_alerts::approval::{Record as Question, Request, digest};
use understudy_alerts::repeat::Repeats;
use understudy_alerts::settings::{Delivery, Kind, Recipient};
use understudy_alerts::spool::Item;
use understudy_crm::estate::Automation;
use understudy_crm::records::{self, Hold, Move, Order, Plan, Progress, Records, State, What};
use understudy_crm::xml::Element;
use understudy_disk::Tag;
use understudy_disk::mirror::SliceLabel;
use understudy_disk::{Format, Identity, Ownership};
use understudy_monitor::matrix::{Bmc, Guest, Machine, Matrix, line};
use understudy_monitor::wire::{Heartbeat, MachineSeen, Plane};
use understudy_protocol::board::{Attach, Message as Board};
use understudy_protocol::control::{PromoteFrom, ReplicatorRequest, VmmRequest, encode_line};
use understudy_protocol::frame::{self, Header};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::codec::{BatchWriter, EncodingConfig, EpochDigest, PAGE, state::StateEncoder};
use understudy_replicator::durable::{ImageKind, RamIdentity, Record};
use understudy_replicator::message::{End, Hello, Log, Message, Part, PartContent, VERSION};
use understudy_replicator::paths::wire::{Frame, Level, SessionId};
use understudy_vmm::boot::least_bzimage;
use understudy_vmm::container;
use understudy_vmm::devices::Payload;
use understudy_vmm::devices::rtc::Rtc;
use understudy_vmm::devices::uart16550::Uart16550;

use crate::targets::{disk, machine};

/// Target, name of the file, content.
pub type Seed = (&'static str, &'static str, Vec<u8>);

/// All of them.
pub fn seeds() -> Vec<Seed> {
    let mut seeds = protocol();
    seeds.extend(paths());
    seeds.extend(replication());
    seeds.extend(machines());
    seeds.extend(cluster());
    seeds.extend(alerts());
    seeds.extend(disks());
    seeds.extend(estates());
    seeds
}

fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
    let header = Header { kind, flags: 0, epoch: Epoch(7), generation: Generation(3) };
    let mut bytes = Vec::new();
    // Far below the limit.
    frame::encode(&header, payload, &mut bytes).expect("a small record");
    bytes
}

fn protocol() -> Vec<Seed> {
    let mut stream = vec![3];
    stream.extend(record(1, b"hello"));
    stream.extend(record(2, &[0; 100]));
    let attach = Board::Attach(Attach {
        machine: "dispatch-1".into(),
        device: "gps".into(),
        life: Generation(2),
        tx_acked: 0,
        rx_acked: 0,
        rx_next: 0,
    });
    let said = [
        attach,
        Board::Out { offset: 0, bytes: b"hello".to_vec() },
        Board::InAck { upto: 2 },
        Board::OutAck { applied: 105 },
        Board::In { offset: 50, bytes: b"$GPGGA".to_vec() },
        Board::Detach,
    ];
    let mut session = Vec::new();
    for message in said {
        let record = message.to_record(Generation(3));
        session.extend([record.header.kind, 3, record.payload.len() as u8]);
        session.extend(record.payload);
    }
    let image = PromoteFrom::Image { state_file: "/state".into(), epoch: Epoch(4) };
    let mut lines = encode_line(&VmmRequest::Promote { generation: Generation(3), from: image });
    lines.extend(encode_line(&VmmRequest::Status));
    lines.extend(encode_line(&ReplicatorRequest::TakeOver { generation: Generation(u64::MAX) }));
    lines.extend(b"{\"error\":\"the machine already runs\"}\n");
    vec![
        ("frame", "two-records", stream),
        ("frame", "empty", Vec::new()),
        ("control", "requests", lines),
        ("key", "whole", format!("understudy-key-1\n{}\n", "5a".repeat(32)).into_bytes()),
        ("key", "bare", format!("{}\n", "5a".repeat(32)).into_bytes()),
        ("handshake", "accept", [&[0][..], b"understudy/1 replication\n", &[0, 48], &[1; 48]].concat()),
        ("handshake", "connect", [&[1, 0, 0, 48][..], &[2; 48]].concat()),
        ("handshake", "stream", [&[2, 0, 32][..], &[3; 32]].concat()),
        ("board", "session", session),
        ("corosync", "two-links", COROSYNC.into()),
    ]
}

const COROSYNC: &str = "totem {\n  transport: knet\n}\nnodelist {\n  node {\n    name: n1\n    ring0_addr: 10.0.0.1\n    ring1_addr: 10.0.1.1\n  }\n}\n";

fn paths() -> Vec<Seed> {
    let (session, level) = (SessionId([7; 16]), Level { received: 5, limit: 400 });
    vec![
        ("paths", "open", Frame::Open { session, path: 0, paths: 2 }.encode()),
        ("paths", "data", Frame::Data(5, vec![1; 40]).encode()),
        ("paths", "pong", Frame::Pong(3, level).encode()),
    ]
}

fn replication() -> Vec<Seed> {
    let hello = |disks| {
        Message::Hello(Hello {
            version: VERSION,
            machine: "m".into(),
            node: "n1".into(),
            ram_bytes: 64 * PAGE as u64,
            session: 9,
            went_on: false,
            migration: false,
            disks,
        })
    };
    let (mirrored, hello) = (hello(vec!["vda".into()]), hello(Vec::new()));
    let tag = Tag { serial: 1, generation: Generation(3), epoch: Epoch(1), records: 1, digest: 9 };
    let slice = SliceLabel { serial: 1, generation: Generation(3), epoch: Epoch(1) };
    let part = |content| Message::Part(Part { disk: 0, number: 1, at: 512, len: 512, content });
    let log = Message::Log(Log { disk: 0, slice, offset: 0, closed: Some(tag), bytes: &[7; 64] });
    let mut digest = EpochDigest::default();
    let mut writer = BatchWriter::default();
    writer.restart(64, &EncodingConfig::default(), 5);
    for (index, fill) in [(0, 1), (1, 0), (2, 1), (63, 9)] {
        writer.push(index, &[fill; PAGE], &mut digest);
    }
    writer.seal();
    let batch = writer.bytes().to_vec();
    let state = vec![7; 300];
    let mut full = Vec::new();
    let mut encoder = StateEncoder::default();
    encoder.encode(Epoch(1), &state, &mut full);
    digest.state(&state);
    let end = Message::End(End { pages: 4, state_len: 300, digest: digest.finish() });
    let mut conversation = Vec::new();
    let mut say = |epoch: u8, message: &Message<'_>| {
        let payload = message.payload();
        conversation.extend([1, message.kind(), 3, epoch, payload.len().min(255) as u8]);
        conversation.extend(&payload[..payload.len().min(255)]);
    };
    say(0, &hello);
    say(0, &Message::SyncBegin);
    say(0, &Message::SyncPages(&batch));
    say(1, &Message::State(&full[..full.len().min(255)]));
    say(1, &end);
    say(1, &Message::HandedOver);
    let mut with_disks = Vec::new();
    let mut say = |epoch: u8, message: &Message<'_>| {
        let payload = message.payload();
        with_disks.extend([1, message.kind(), 3, epoch, payload.len().min(255) as u8]);
        with_disks.extend(&payload[..payload.len().min(255)]);
    };
    say(0, &mirrored);
    say(0, &Message::SyncBegin);
    say(0, &part(PartContent::Zero));
    say(0, &Message::Flush);
    say(1, &Message::InStep(vec![tag]));
    say(1, &log);
    say(1, &Message::Seal(vec![tag]));
    let record = Record {
        image: ImageKind::Whole,
        generation: Generation(3),
        epoch: Epoch(9),
        session: 4,
        ram: Some(RamIdentity { dev: 1, ino: 2, bytes: 64 * PAGE as u64 }),
        ..Record::default()
    };
    // Plain data: it serialises.
    let line = serde_json::to_vec(&record).expect("a record");
    let mut index = b"UndStg2\n".to_vec();
    index.extend(5u64.to_le_bytes());
    for (page, slot) in [(1u64, u64::MAX), (2, 0)] {
        index.extend(page.to_le_bytes());
        index.extend(slot.to_le_bytes());
        index.extend([0; 16]);
    }
    let one = |message: &Message<'_>| [&[message.kind()][..], &message.payload()].concat();
    vec![
        ("message", "hello", one(&hello)),
        ("message", "end", one(&end)),
        ("message", "part", one(&part(PartContent::Hash([1; 32])))),
        ("message", "log", one(&log)),
        ("message", "in-step", one(&Message::InStep(vec![tag]))),
        ("message", "ping", one(&Message::Ping)),
        ("batch", "four-pages", batch.clone()),
        ("batch", "body", [&[4][..], &batch[24.min(batch.len())..]].concat()),
        ("state-delta", "full", full),
        ("receiver", "first-copy", conversation),
        ("receiver", "mirrored", with_disks),
        ("durable", "whole", line),
        ("stage", "two-pages", index),
    ]
}

fn machines() -> Vec<Seed> {
    let (bus, _) = machine::bus();
    let mut payloads = bus.save_payloads();
    payloads.push(Payload::of(&Uart16550::new(), "com1"));
    payloads.push(Payload::of(&Rtc::new(1_600_000_000, 1 << 30, 0), "rtc"));
    let state = |which: u8, payload: &Payload| [&[which][..], &payload.bytes].concat();
    // Descriptor 0 of the console's second queue, offered and kicked; then the first queue's.
    let mut guest = vec![0, 0];
    for queue in [1, 0] {
        guest.extend([5, 1, queue, 0, 1, 0x20, 8, 0, 0, 0, if queue == 0 { 2 } else { 0 }, 0, 0, 0]);
        guest.extend([6, 1, queue, 0, 7, 1, queue, 8, 1, 4, 1, 2, 3, 4]);
    }
    guest.extend([5, 0, 0, 0, 1, 0x30, 8, 0, 0, 0, 2, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 8, 0, 2, 9, 9, 9, 0, 1]);
    vec![
        ("container", "small-machine", container::encode(&payloads)),
        ("container", "uart", state(0, &Payload::of(&Uart16550::new(), "x"))),
        ("container", "rtc", state(1, &Payload::of(&Rtc::new(1_600_000_000, 1 << 30, 0), "x"))),
        ("container", "console", state(5, payloads.iter().find(|p| p.bytes.len() > 40).unwrap_or(&payloads[0]))),
        ("bzimage", "header", least_bzimage()),
        ("virtio", "send-and-receive", guest),
        (
            "virtio-blk",
            "write-read-takeover",
            vec![
                0, 3, 0, 1, 2, 0x90, 8, 0, 4, 3, 1, 0, 3, 0x91, 8, 0, 7, 4, 6, 0, 2, 6, 0, 2, 3, 0, 8, 0, 0x92, 1, 0,
                3, 0, 4, 0, 0, 0, 0, 4, 6, 0, 0,
            ],
        ),
        (
            "virtio-net",
            "send-command-receive-takeover",
            vec![
                255, 255, 3, 1, 1, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6, 1, 3, 1, 1, 200, 1, 1, 54, 0, 168, 5, 34, 0,
                16, 0, 6, 1, 3, 2, 2, 3, 0, 0, 0, 3, 0, 2, 100, 4, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 4, 0, 40, 1,
                1, 54, 0, 168, 5, 34, 0, 16, 0,
            ],
        ),
        (
            "virtio-scsi",
            "write-abort-read-takeover-eject",
            vec![
                0, 3, 2, 0, 0x40, 1, 10, 0x2a, 0, 0, 0, 0, 5, 0, 0, 2, 0, 16, 5, 3, 0, 0, 0, 0, 0, 6, 0, 2, 3, 2, 1, 0,
                1, 10, 0x28, 0, 0, 0, 0, 1, 0, 0, 1, 0, 32, 5, 8, 5, 7, 5, 3, 1, 0, 0, 0, 4, 7, 0x90, 8,
            ],
        ),
        (
            "scsi",
            "inquiry-read-unmap-toc",
            vec![
                0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0x12, 1, 0xb0, 0, 0xff, 0, 0, 0, 10, 0x28, 0, 0, 0, 0, 5, 0, 0, 2, 0,
                0, 0, 10, 0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0, 24, 0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0,
                0, 16, 0, 0, 0, 0, 2, 6, 0, 0, 0, 0, 0, 0, 0, 2, 10, 0x43, 0, 0, 0, 0, 0, 0, 0, 0xff, 0, 0,
            ],
        ),
        (
            "frames",
            "arp-sent-udp-heard-takeover",
            vec![
                1, 0, 42, 255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0,
                1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 9, 6, 42, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45,
                0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 9, 10, 0, 0, 1, 0, 1, 0, 2, 0, 8, 0, 0, 7, 0,
            ],
        ),
        ("stream", "frame-cut-length-of-none", vec![6, 3, 1, 2, 3, 0, 2, 9, 9, 1, 8, 0, 0, 0, 1, 7, 255, 255, 255]),
        (
            "watchdog",
            "armed-fed-expired",
            // Preloads of one tick, armed, fed, both stages.
            vec![
                0, 5, 0, 4, 1, 0, 0, 0, 5, 4, 4, 1, 0, 0, 0, 1, 0x68, 0, 0, 1, 3, 5, 12, 2, 0, 1, 6, 1, 7, 4, 8, 2, 6,
                1, 7,
            ],
        ),
        (
            "ports",
            "uart-loopback",
            vec![5, 4, 2, 0x1f, 5, 0, 2, b'a', 5, 0, 0, 1, 6, 0, 2, 10, 6, 1, 0, 1, 9, 4, 2, 1, 0, 0, 1, 200],
        ),
    ]
}

fn disks() -> Vec<Seed> {
    let me = Identity { machine: "m".into(), node: "n1".into(), generation: Generation(3) };
    let owner = Ownership::fresh(7, &me, "/vm/m.raw", Format::Raw, 1 << 20);
    // Three slices of two requests each, the first two committed, then a takeover with the last one's tag.
    let one = [0xc2, 2, 1, 1, 7, 0, 9, 3];
    let sealed = [0x82, 2, 1, 1, 8, 2, 4, 0, 5];
    let peer = r#"{"node":"b","machine":"m","disk":7,"generation":1,"size":16384,"format":"raw","standing":{"Follows":{"at":{"serial":2,
        "generation":1,"epoch":0,"records":0,"digest":0},"sealed":[]}},"discard":null}"#
        .to_owned();
    let three = [&[3 << 3][..], &[1, 1], &one, &[1, 2], &one, &[1, 3], &sealed, &[1]].concat();
    vec![
        ("slice", "committed", disk::sample()),
        ("slice", "made", one.to_vec()),
        ("owner", "record", owner.encode()),
        ("owner", "name", b"000000000000002b-7-1f-8.slice".to_vec()),
        ("takeover", "three-slices", three),
        ("storage", "keys", [&[0, 0, 0, 7, 0, 0, 0, 16][..], &[1; 16]].concat()),
        (
            "storage",
            "held",
            [&[0, 0, 0, 7, 0, 0, 0, 16][..], &[0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 5, 0, 0]].concat(),
        ),
        ("storage", "capacity", [&[0, 0, 0, 0, 0, 0, 255, 255, 0, 0, 2, 0, 0, 0, 0xc0, 0][..], &[0; 16]].concat()),
        ("storage", "limits", [&[0, 0xb0, 0, 60][..], &[1; 60]].concat()),
        ("storage", "address", b"iscsi://[2001:db8::1]:3261/iqn.2026-11.org.example:db/1".to_vec()),
        (
            "storage",
            "disk",
            b"name=vda,file=iscsi://san/iqn.a:b/1,format=raw,slices=/vm/row,chap=/etc/chap,queues=4".to_vec(),
        ),
        ("mirror", "state", peer.into_bytes()),
        ("mirror", "session", [&[0, 0, 2, 1, 32][..], &one, &[9]].concat()),
    ]
}

fn alerts() -> Vec<Seed> {
    let request = Request {
        id: "n1-17".into(),
        plan: digest("p"),
        summary: "web1 to n2".into(),
        asked: 1,
        expires: 900,
        approvers: vec!["night".into()],
    };
    // A sound name.
    let record = Question::ask(request).expect("a record");
    let xml = format!(
        "<xpath-query><nvpair id=\"a\" name=\"understudy-approval-n1-17\" value=\"{}\"/></xpath-query>",
        record.to_json().replace('"', "&quot;")
    );
    let settings = "<alert id=\"understudy-alert\"><instance_attributes><nvpair name=\"mail_tls\" value=\"starttls\"/></instance_attributes>\
        <recipient value=\"a@b\"><instance_attributes><nvpair name=\"kind\" value=\"mail\"/></instance_attributes></recipient></alert>";
    let mail = "From: a@b\r\nMIME-Version: 1.0\r\nContent-Type: multipart/alternative; boundary=x\r\n\r\n--x\r\n\
        Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nAPPROVE n1-17 DBPB-3551\r\n=20\r\n\
        --x\r\nContent-Type: text/html\r\n\r\n<div>REFUSE n1-17 DBPB-3551</div>\r\n--x--\r\n";
    let alarm = Alarm::new(Severity::Warning, "n1 is lost", "text").key("k");
    let recipient = Recipient {
        name: "night".into(),
        kind: Kind::Mail,
        to: "a@b".into(),
        approves: true,
        severity: Severity::Info,
        window: 300,
    };
    let mut repeats = Repeats::default();
    repeats.take(&recipient, &alarm, 1);
    repeats.take(&recipient, &alarm, 2);
    let item = Item { at: 1, alarm, recipient, delivery: Delivery::default(), everywhere: true, tries: 1, next: 9 };
    let event = "CRM_alert_kind=resource\nCRM_alert_rsc=vm-m1:0\nCRM_alert_task=monitor\nCRM_alert_rc=7\nCRM_alert_target_rc=8\n\
        CRM_alert_node=n1\nCRM_alert_interval=5000\nCRM_alert_desc=not running\n";
    vec![
        ("approval", "record", record.to_json().into_bytes()),
        ("approval", "in-the-cib", xml.into_bytes()),
        ("approval", "settings", settings.into()),
        ("reply", "mail", mail.into()),
        ("reply", "hook", br#"{"answer": "refuse", "id": "n1-17", "code": "DBPB-3551"}"#.to_vec()),
        ("reply", "text", b"approve n1-17 dbpb 3551\n> REFUSE n1-17 DBPB-3551\n".to_vec()),
        // Plain data: it serialises.
        ("spool", "item", serde_json::to_vec(&item).expect("an item")),
        ("spool", "repeats", repeats.to_bytes()),
        ("spool", "event", event.into()),
    ]
}

fn cluster() -> Vec<Seed> {
    let cib = "<cib admin_epoch=\"0\" epoch=\"7\"><configuration><nodes><node id=\"1\" uname=\"n1\"><instance_attributes id=\"i\">\
               <nvpair id=\"g\" name=\"understudy-generation-m1\" value=\"3\"/></instance_attributes></node></nodes><resources>\
               <clone id=\"c\"><primitive id=\"vm-m1\" class=\"ocf\" provider=\"understudy\" type=\"vmm\"><instance_attributes id=\"j\">\
               <nvpair id=\"n\" name=\"name\" value=\"m1\"/></instance_attributes></primitive></clone></resources><constraints>\
               <rsc_location id=\"understudy-veto-m1\" rsc=\"c\"><rule id=\"r\" role=\"Promoted\" score=\"-INFINITY\">\
               <expression id=\"e\" attribute=\"#uname\" operation=\"ne\" value=\"n1\"/></rule></rsc_location></constraints>\
               </configuration><status><node_state uname=\"n1\"><transient_attributes><instance_attributes>\
               <nvpair name=\"master-vm-m1\" value=\"10001\"/></instance_attributes></transient_attributes></node_state></status></cib>\n";
    let environment = "OCF_RESKEY_CRM_meta_notify_type=pre\nOCF_RESKEY_CRM_meta_notify_operation=promote\n\
                       OCF_RESKEY_CRM_meta_notify_promote_resource=vm:0\nOCF_RESKEY_CRM_meta_notify_promote_uname=n1\n\
                       OCF_RESKEY_CRM_meta_timeout=20000\nOCF_RESKEY_CRM_meta_interval=10s\nOCF_RESKEY_name=m1\nOCF_RESKEY_memory=64\n\
                       OCF_RESKEY_peers=n1=10.0.0.1:7790 n2=10.0.0.2:7790\nOCF_RESKEY_line=tty:/dev/ttyS0,115200\n";
    let mut journal = vec![0];
    journal.extend(b"UsBoard1");
    journal.extend([0; 16]);
    for number in [5u64, 3, 2, 100, 110, 40, 60] {
        journal.extend(number.to_le_bytes());
    }
    journal.extend([1, 0]);
    vec![
        ("cib", "vetoed", cib.into()),
        ("cib", "crm", "<cib><configuration><crm_config/><resources/><constraints/></configuration></cib>".into()),
        ("policy", "demo", include_str!("../../tests/demo/policy.toml").into()),
        ("environment", "notify", environment.into()),
        ("journal", "dirty", journal),
    ]
}

fn estates() -> Vec<Seed> {
    let seen = MachineSeen { name: "m1".into(), machine: Machine::Running, guest: Guest::Unwatched };
    let beat = |node: &str, number, plane| Heartbeat {
        node: node.into(),
        began: 1,
        number,
        plane,
        hears: vec!["n1".into(), "n2".into()],
        machines: vec![seen.clone()],
        left_out: 0,
        bmc: [("n4".to_owned(), Bmc::Off)].into(),
    };
    let said = [beat("n2", 1, Plane::Production), beat("n2", 1, Plane::Management), beat("n3", 1, Plane::Production)];
    // Texts and numbers.
    let body = |beat: &Heartbeat| serde_json::to_vec(beat).expect("plain data");
    let bodies: Vec<Vec<u8>> = said.iter().chain(&[beat("n2", 2, Plane::Production)]).map(body).collect();
    let members = "<pacemaker-result api-version=\"2.25\"><nodes><node name=\"n1\" online=\"true\" unclean=\"false\" type=\"member\">\
        <resource id=\"x\"><node name=\"no\" online=\"true\"/></resource></node><node name=\"n2\" online=\"false\" unclean=\"true\" type=\"member\"/>\
        <node name=\"b1\" online=\"true\" type=\"remote\"/></nodes></pacemaker-result>";
    // A table that every run reads.
    let matrix = Matrix::standard().expect("the default rows");
    let rows: Vec<_> = matrix.rows().map(|(row, _)| row.clone()).collect();
    let own = "matrix = [{ name = 'ours', management = 'down', bmc = ['on', 'unknown'], production = 'up', verdict = 'alarm' },\n\
        { name = 'management-only', machine = 'running', management = 'down', production = 'up', why = 'x', verdict = 'freeze' }]";
    let links = "Local node ID 1, transport knet\nLINK ID 0 udp\n\taddr\t= 10.0.0.1\n\tstatus:\n\t\tnodeid:          1:\tlocalhost\n\
        \t\tnodeid:          2:\tconnected\nLINK ID 1 udp\n\tstatus:\n\t\tnodeid:          2:\tdisconnected\n";
    let progress = [
        Progress::Waiting,
        Progress::Ready { by_person: true },
        Progress::Released { at: 7, batch: 1 },
        Progress::Failed { why: "\"why\" <&>".into() },
    ];
    let moves = progress.into_iter().enumerate().map(|(i, progress)| Move {
        machine: format!("m{i}"),
        from: "n1".into(),
        to: "n2".into(),
        progress,
    });
    let plan = Plan {
        id: "p1".into(),
        kind: records::Kind::Drain,
        automation: Automation::Semi,
        made: 7,
        lost: vec!["n1".into()],
        moves: moves.collect(),
        batches: 1,
        held: Some(Hold::Brake { why: "too many".into() }),
        decided: None,
        closed: None,
    };
    let order = Order { plan: "p1".into(), what: What::Release, machines: vec!["m0".into()], by: "root".into() };
    let state = State { plans: 1, idle: [("m0".to_owned(), 5)].into(), ..State::default() };
    let mut cib = Element::new("cib");
    records::write(&mut cib, &Records { state, plans: vec![plan], orders: [("1".to_owned(), order)].into() });
    // Host a dies; time passes; m1 is released, m2 approved; m3 runs on b, which is lost then.
    let life = [
        [0, 0, 4],
        [6, 0, 20],
        [6, 0, 20],
        [8, 0, 1],
        [9, 0, 2],
        [2, 2, 2],
        [6, 0, 1],
        [0, 1, 3],
        [6, 0, 30],
        [0, 1, 4],
        [6, 0, 30],
        [6, 0, 30],
        [0, 0, 0],
        [6, 0, 30],
        [8, 2, 3],
        [6, 0, 30],
    ];
    vec![
        ("heartbeat", "two-planes", bodies.join(&b'\n')),
        ("heartbeat", "sealed", said[0].seal(&[7; 32])),
        ("members", "lost-and-remote", members.into()),
        ("matrix", "default-rows", line(&rows).into_bytes()),
        ("matrix", "own-rows", own.into()),
        ("links", "one-of-two", links.into()),
        ("records", "plan-and-order", cib.to_string().into_bytes()),
        ("controller", "a-host-dies", life.concat()),
    ]
}
