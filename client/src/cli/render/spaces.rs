//! Address spaces, and what one address means in each.

use pagewalk_proto::readable;

use super::{
    hex, outcome, paint, provenance,
    table::{Cell, Table},
};
use crate::v1::{
    ListAddressSpacesResponse, Task, TaskList, TaskListState, TranslateAcrossResponse,
    space_translation::Outcome,
};

pub(in crate::cli) fn list(answer: &ListAddressSpacesResponse) -> String {
    if answer.spaces.is_empty() {
        return "no vCPU was seen in an address space yet".into();
    }
    let mut table = Table::new(&["CR3", "SEEN", "LAST BY", "GENERATION", "AGE", "ISOLATION", "TASKS"]);
    for space in &answer.spaces {
        let isolation = space.isolation_pair.map_or_else(String::new, |pair| {
            let (this, other) = if space.user_half { ("user", "kernel") } else { ("kernel", "user") };
            format!("{this} half; {other} half {}", hex(pair))
        });
        let seen = space.sightings > 0;
        table.row([
            Cell::address(space.cr3),
            space.sightings.to_string().into(),
            (if seen { format!("vcpu {}", space.vcpu) } else { String::new() }).into(),
            (if seen { space.generation.to_string() } else { String::new() }).into(),
            provenance::age(space.age.as_ref()).unwrap_or_default().into(),
            isolation.into(),
            tasks(&space.tasks, space.tasks_left_out).into(),
        ]);
    }
    let mut text = table.render();
    if answer.left_out > 0 {
        text += &format!("\n{} more are left out", answer.left_out);
    }
    if let Some(problem) = answer.task_list.as_ref().and_then(problem) {
        text += &format!("\n{problem}");
    }
    text
}

/// Why tasks are missing.
fn problem(list: &TaskList) -> Option<String> {
    let reason = readable(&list.reason);
    match list.state() {
        TaskListState::Complete | TaskListState::Unspecified => None,
        TaskListState::Incomplete => {
            Some(format!("tasks may be missing, {} were found: {reason}", list.count))
        }
        TaskListState::Unknown => Some(format!("no tasks: {reason}")),
    }
}

/// `1 init, 57 cat`, and how many more.
fn tasks(tasks: &[Task], left_out: u32) -> String {
    let mut tasks: Vec<String> =
        tasks.iter().map(|task| format!("{} {}", task.pid, readable(&task.name))).collect();
    if left_out > 0 {
        tasks.push(format!("{left_out} more"));
    }
    tasks.join(", ")
}

/// A line for each address space, and one for all.
pub(in crate::cli) fn across(answer: &TranslateAcrossResponse) -> String {
    let name = outcome::symbol(answer.symbol.as_ref());
    let mut lines: Vec<String> = answer
        .spaces
        .iter()
        .map(|space| {
            let said = match &space.outcome {
                Some(Outcome::Translation(found)) => outcome::translation(found),
                Some(Outcome::Fault(refused)) => outcome::fault(refused),
                None => paint::bad("unknown outcome"),
            };
            let tasks = match tasks(&space.tasks, space.tasks_left_out) {
                none if none.is_empty() => none,
                tasks => format!(" ({tasks})"),
            };
            format!("CR3 {}{tasks}  {}{name} -> {said}", hex(space.cr3), hex(answer.address))
        })
        .collect();
    if lines.is_empty() {
        lines.push("no vCPU was seen in an address space yet: name some by their CR3s".into());
    }
    let incomplete = |list: &&TaskList| list.state() == TaskListState::Incomplete;
    lines.extend(answer.task_list.as_ref().filter(incomplete).and_then(problem));
    lines.push(provenance::short(answer.provenance.as_ref()));
    lines.join("\n")
}
