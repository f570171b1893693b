use super::*;

/// The golden cases: one a line, `COLUMN=VALUE … -> ROW VERDICT`; what is not said is up, on, running, unwatched, untried.
const CASES: &str = include_str!("../../tests/matrix.cases");

fn standard() -> Matrix {
    Matrix::standard().unwrap()
}

fn observation(text: &str) -> Observation {
    let mut o = Observation {
        management: Management::Up,
        production: Production::Up,
        bmc: Bmc::On,
        machine: Machine::Running,
        guest: Guest::Unwatched,
        restart: Restart::Untried,
    };
    fn value<T: Copy>(all: &[T], name: fn(T) -> &'static str, text: &str) -> T {
        *all.iter().find(|v| name(**v) == text).unwrap_or_else(|| panic!("no value {text}"))
    }
    for word in text.split_whitespace() {
        let (column, text) = word.split_once('=').unwrap();
        match column {
            "management" => o.management = value(Management::ALL, Management::as_str, text),
            "production" => o.production = value(Production::ALL, Production::as_str, text),
            "bmc" => o.bmc = value(Bmc::ALL, Bmc::as_str, text),
            "machine" => o.machine = value(Machine::ALL, Machine::as_str, text),
            "guest" => o.guest = value(Guest::ALL, Guest::as_str, text),
            "restart" => o.restart = value(Restart::ALL, Restart::as_str, text),
            other => panic!("no column {other}"),
        }
    }
    o
}

fn row(text: &str) -> Row {
    toml::from_str(text).unwrap()
}

#[test]
fn every_golden_case_is_judged_as_it_says_and_every_row_has_one() {
    let matrix = standard();
    let mut seen = Vec::new();
    for line in CASES.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let (what, expected) = line.split_once("->").unwrap();
        let o = observation(what);
        let row = matrix.row(&o).unwrap();
        assert_eq!(format!("{} {}", row.name, row.verdict), expected.trim(), "{line}");
        seen.push(row.name.clone());
    }
    for (row, _) in matrix.rows() {
        assert!(seen.contains(&row.name), "no golden case for row {}", row.name);
    }
}

#[test]
fn the_default_table_answers_everything_and_permits_nothing_that_is_forbidden() {
    let matrix = standard();
    let mut deciding = std::collections::BTreeSet::new();
    for o in Observation::all() {
        let row = matrix.row(&o).unwrap_or_else(|| panic!("no row for {o}"));
        assert_eq!(forbidden(&o, row.verdict), None, "{}: {o}", row.name);
        deciding.insert(row.name.clone());
    }
    assert_eq!(deciding.len(), matrix.rows().count(), "a row that never decides");
}

#[test]
fn nothing_is_started_elsewhere_without_a_stop_a_fence_or_a_host_without_power() {
    for o in Observation::all() {
        let verdict = standard().judge(&o);
        if !verdict.elsewhere() {
            continue;
        }
        let certain = match verdict {
            // The node itself stops it, and is fenced if it cannot.
            Verdict::Move | Verdict::Relocate => o.management == Management::Up,
            Verdict::FenceAndEvacuate => o.bmc != Bmc::Unreachable,
            _ => o.bmc == Bmc::Off && o.machine != Machine::Running && o.guest != Guest::Up,
        };
        assert!(certain, "{o}: {verdict}");
    }
}

#[test]
fn a_silent_agent_is_restarted_before_anything_else_happens_to_its_machine() {
    let mut o = observation("machine=silent");
    for &production in Production::ALL {
        o.production = production;
        assert_eq!(standard().judge(&o), Verdict::RestartAgent);
    }
    assert_eq!(standard().judge(&Observation { restart: Restart::Failed, ..o }), Verdict::Relocate);
}

#[test]
fn a_row_of_the_policy_replaces_its_namesake_and_any_other_comes_first() {
    let own = [
        row(
            "name = 'management-only'\nmanagement = 'down'\nproduction = 'up'\nbmc = ['on', 'unknown']\nverdict = 'fence-and-evacuate'",
        ),
        row("name = 'ours'\nmanagement = 'up'\nproduction = 'rack'\nverdict = 'alarm'"),
    ];
    let (matrix, bad) = Matrix::with(&own).unwrap();
    assert_eq!(bad, []);
    let names: Vec<&str> = matrix.rows().map(|(r, _)| r.name.as_str()).collect();
    assert_eq!(names[0], "ours");
    assert_eq!(names.len(), standard().rows().count() + 1);
    assert_eq!(matrix.judge(&observation("management=down")), Verdict::FenceAndEvacuate);
    assert_eq!(matrix.judge(&observation("production=rack")), Verdict::Alarm);
    assert!(matrix.table().contains("ours *"));
    assert_eq!(matrix.list().iter().filter(|r| r.of_the_policy).count(), 2);
}

#[test]
fn a_row_that_would_start_a_machine_twice_is_refused_with_its_reason() {
    let refused = |text: &str, why: &str| {
        let (matrix, bad) = Matrix::with(&[row(text)]).unwrap();
        assert_eq!(bad.len(), 1, "{text}");
        assert!(bad[0].to_string().contains(why), "{}", bad[0]);
        assert_eq!(matrix, standard(), "it counts nevertheless");
    };
    refused("name = 'x'\nmanagement = 'down'\nverdict = 'evacuate'", "BMC says that it has no power");
    refused("name = 'x'\nmanagement = 'down'\nbmc = 'off'\nverdict = 'evacuate'", "still heard");
    refused(
        "name = 'x'\nmanagement = 'down'\nbmc = 'unreachable'\nverdict = 'fence-and-evacuate'",
        "no fence is confirmed",
    );
    refused("name = 'x'\nmanagement = 'down'\nverdict = 'restart-machine'", "no member");
    refused("name = 'x'\nmanagement = 'down'\nverdict = 'relocate'", "no member");
    refused("name = 'x'\nproduction = 'node'\nmanagement = 'up'\nverdict = 'move'", "machine = \"running\"");
    refused("name = 'x'\nbmc = []\nverdict = 'alarm'", "empty list");
    refused("name = 'a b'\nverdict = 'alarm'", "letters, digits");
    refused(
        "name = 'contradiction'\nmanagement = 'up'\nproduction = 'up'\nmachine = 'running'\nguest = 'up'\nverdict = 'alarm'",
        "never decides",
    );
}

#[test]
fn rows_in_one_line_are_the_same_rows() {
    let own = [
        row("name = 'a'\nmanagement = 'up'\nproduction = ['rack', 'node']\nmachine = 'running'\nverdict = 'alarm'"),
        row("name = 'management-only'\nmanagement = 'down'\nproduction = 'up'\nverdict = 'freeze'"),
    ];
    let text = line(&own);
    assert!(!text.contains('\n'));
    let (direct, read) = (Matrix::with(&own).unwrap().0, Matrix::read_line(&text).unwrap());
    for o in Observation::all() {
        assert_eq!(direct.row(&o).map(|r| &r.name), read.row(&o).map(|r| &r.name));
        assert_eq!(direct.judge(&o), read.judge(&o));
    }
    assert_eq!(Matrix::read_line("").unwrap(), standard());
    assert!(Matrix::read_line("matrix = [{ name = 'x', management = 'down', verdict = 'evacuate' }]").is_err());
}

#[test]
fn a_bad_row_does_not_take_good_ones_with_it() {
    let good = row("name = 'good'\nmanagement = 'up'\nproduction = 'rack'\nverdict = 'alarm'");
    let bad = row("name = 'bad'\nmanagement = 'down'\nverdict = 'evacuate'");
    let (matrix, wrong) = Matrix::with(&[bad, good.clone(), good.clone()]).unwrap();
    assert_eq!(wrong.iter().map(|b| b.index).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(matrix.rows().filter(|(_, own)| *own).map(|(r, _)| r).collect::<Vec<_>>(), [&good]);
}

mod any {
    use proptest::prelude::*;

    use super::*;

    fn cell<T: Copy + std::fmt::Debug + 'static>(all: &'static [T]) -> impl Strategy<Value = Option<Cell<T>>> {
        proptest::option::of(proptest::sample::subsequence(all.to_vec(), 0..=all.len()).prop_map(Cell::Several))
    }

    prop_compose! {
        fn rows()(
            name in "[a-c]|healthy|host-dead",
            management in cell(Management::ALL),
            production in cell(Production::ALL),
            bmc in cell(Bmc::ALL),
            machine in cell(Machine::ALL),
            guest in cell(Guest::ALL),
            restart in cell(Restart::ALL),
            verdict in proptest::sample::select(Verdict::ALL),
        ) -> Row {
            Row { name, management, production, bmc, machine, guest, restart, verdict, why: String::new() }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_a_policy_says_what_counts_of_it_is_permitted(own in proptest::collection::vec(rows(), 0..4)) {
            let (matrix, bad) = Matrix::with(&own).unwrap();
            for o in Observation::all() {
                prop_assert_eq!(forbidden(&o, matrix.judge(&o)), None, "{} after {:?}", o, bad);
            }
        }
    }
}
